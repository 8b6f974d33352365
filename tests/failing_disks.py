"""Runs every command that writes, on a disk that is full or on one that is read-only, in a mount namespace of its own.

`unshare --user --map-root-user --mount python -m tests.failing_disks FOLDER STATE` prints what became of each as JSON.
Everything is prepared in FOLDER first (`prepare_folder`); it is copied to a small tmpfs, which is filled to the last byte.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

SIZE = 64 << 20
RECIPE = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
TRAIN = [
    RECIPE,
    "model.encoder=small_resnet",
    "data.image_size=16",
    "batch.global_size=16",
    "data.workers=0",
    "tracking.name=none",
    "train.epochs=1",
]


def prepare_folder(folder: Path) -> None:
    """A trained run with a report, an export and an evaluation, its shards, and a folder of images."""
    from clae_dist.cli import main
    from clae_dist.data.synthetic import write_synthetic_set

    write_synthetic_set(folder / "shards", 40, 16)
    for number in range(12):
        path = folder / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 * number, 99, 7)).save(path)
    run = f"run_dir={folder / 'run'}"
    more = [
        "launch.workers=1",
        "launch.launcher=local",
        "train.threads=1",
        f"data.shards={folder / 'shards'}",
        "evaluation.knn_k=5",
    ]
    for arguments in (["train", *TRAIN, *more, run], ["evaluate"], ["report"], ["export"]):
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(arguments if "train" in arguments else [*arguments, str(folder / "run")])
        assert code == 0, arguments


def commands(disk: Path, outside: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    from clae_dist.cli import main as clae
    from data_prep.__main__ import main as data_prep

    run, shards = disk / "run", disk / "shards"
    named = {
        "evaluate": ["evaluate", str(run), "--shards", str(outside / "shards")],
        "report": ["report", str(run), "--shards", str(outside / "shards")],
        "export": ["export", str(run)],
        "export elsewhere": ["export", str(outside / "run"), "--to", str(disk / "exported")],
        "checkpoints": ["checkpoints", str(outside / "run"), "--export", "--to", str(disk / "whole.safetensors")],
        "train": [
            "train",
            *TRAIN,
            "launch.workers=1",
            "launch.launcher=local",
            f"data.shards={outside / 'shards'}",
            f"run_dir={disk / 'new'}",
        ],
    }
    for name, arguments in named.items():
        yield name, lambda arguments=arguments: clae(arguments)  # type: ignore[misc]
    prepared = {
        "prepare": ["prepare", str(outside / "images"), str(disk / "prepared"), "--workers", "0", "--test-share", "0"],
        "prepare in processes": ["prepare", str(outside / "images"), str(disk / "prepared"), "--workers", "1"],
        "index": ["index", str(outside / "shards" / "train-000000.tar"), "--to", str(disk / "indexed"), "--workers", "0"],
        "audit": ["audit", str(shards), "--report", str(disk / "audited"), "--workers", "0"],
        "demo": ["demo", str(disk / "demo"), "--data", str(outside / "images"), "--workers", "0"],
    }
    for name, arguments in prepared.items():
        yield name, lambda arguments=arguments: data_prep(arguments)  # type: ignore[misc]


def fill(disk: Path) -> None:
    """To the last byte: what is asked for and does not fit is an error, a part of it is not."""
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def files(disk: Path) -> dict[str, bytes]:
    found = (path for path in disk.rglob("*") if path.is_file() and path.name != "filler")
    return {str(path.relative_to(disk)): path.read_bytes() for path in found}


def main(folder: Path, state: str) -> None:
    found = []
    disk = folder / f"disk-{state}"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)], check=True)
    for name in ("run", "shards"):
        shutil.copytree(folder / name, disk / name)
    if state == "full":
        fill(disk)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for name, command in commands(disk, folder):
        before, started = files(disk), time.monotonic()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command()
        after = files(disk)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        found.append([name, code, err.getvalue(), changed, round(time.monotonic() - started, 2)])
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
