"""kill -9 between shards and in the middle of one, for every kind of source: the same command ends with the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.verify import verify
from tests.data_prep.published import CIFAR_CLASSES, WNIDS, make_cifar, make_imagenet, make_parquet, make_zip

# The command line, in a process for each strike, which is killed at the Nth of what is counted: images looked at, or files
# given their names. At 17 images the second shard is half written; at 2 names the first shard is in place and not recorded;
# at 3 the second one's index is in place and the shard is not.
STRIKES = [("images", 17), ("names", 2), ("names", 3)]
STRUCK = """
import os, signal, sys
import webdataset.writer, PIL.Image
from data_prep import __main__, workspace, write

def then_strike(function, strike_at, counts):
    done = 0
    def wrapped(*arguments):
        nonlocal done
        result = function(*arguments)
        done += counts(arguments)
        if done == strike_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

def in_place(name):
    return name.endswith((".tar", ".npy")) and not name.startswith(".tmp-")

for strike in sys.argv[1].split(","):
    counted, number = strike.split(":")
    if (child := os.fork()) == 0:
        if counted == "images":
            write.checked = then_strike(write.checked, int(number), lambda _: True)
        else:
            workspace.os.replace = then_strike(os.replace, int(number), lambda names: in_place(os.path.basename(names[1])))
        *words, folder = sys.argv[2:]
        os._exit(__main__.main([*words, folder + "-" + counted + number]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture
def make_source(tmp_path: Path, make_folder: Any, archive: Any, encoded: Any) -> Callable[[str], list[Path]]:
    """make_source(kind): about 60 images in the form that is named."""

    def imagenet() -> list[Path]:
        images = {wnid: [encoded(100 * first + number) for number in range(16)] for first, wnid in enumerate(WNIDS)}
        val = [(WNIDS[number % 3], encoded(500 + number)) for number in range(12)]
        return list(make_imagenet(tmp_path / "ilsvrc", images, val).values())

    def cifar() -> list[Path]:
        rng = np.random.default_rng(0)
        names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
        rows = {name: rng.integers(0, 256, (10, 32, 32, 3), np.uint8) for name in names}
        labels = {name: [number % len(CIFAR_CLASSES[10]) for number in range(10)] for name in names}
        return [make_cifar(tmp_path / "cifar-10-binary.tar.gz", 10, rows, labels)]

    def parquet() -> list[Path]:
        images = [encoded(seed) for seed in range(60)]
        for part in range(2):
            rows = slice(30 * part, 30 * part + 30)
            make_parquet(tmp_path / "set" / f"train-0000{part}.parquet", images[rows], [0, 1] * 15, ["owl", "cat"], group=8)
        return [tmp_path / "set"]

    def archived() -> Path:
        folder: Path = make_folder({"train/cat": 24, "train/dog": 24, "test/cat": 6, "test/dog": 6})
        return folder

    def make(kind: str) -> list[Path]:
        made: dict[str, Callable[[], list[Path]]] = {
            "folder": lambda: [archived()],
            "tar.gz": lambda: [archive(archived(), tmp_path / "set.tar.gz")],
            "zip": lambda: [make_zip(archived(), tmp_path / "set.zip")],
            "imagenet": imagenet,
            "cifar": cifar,
            "parquet": parquet,
        }
        return made[kind]()

    return make


_SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("tar.gz", "imagenet", "cifar")]


@pytest.mark.parametrize(
    "kind", ["zip", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("folder", "parquet")), *_SLOW]
)
def test_killed_anywhere_it_ends_with_the_same_shards_and_writes_none_twice(
    tmp_path: Path, make_source: Any, command: Any, run: Any, content: Any, kind: str
) -> None:
    sources = make_source(kind)
    (script := tmp_path / "struck.py").write_text(STRUCK)
    strikes = ",".join(f"{counted}:{number}" for counted, number in STRIKES)
    how = ["--name", "set", "--source", "made here", "--shard-samples", 12, "--workers", 0, "--resize", "short=6"]
    died = command(strikes, "prepare", *how, *sources, tmp_path / "dst", script=script)
    assert died.stdout.splitlines().count("-9") == len(STRIKES), died.stderr

    settings = {"shard_samples": 12, "resize_short": 6, "quality": 90}
    undisturbed = run(sources, tmp_path / "undisturbed", **settings)
    assert sum(map(len, undisturbed.splits.values())) >= 5
    for counted, number in STRIKES:
        folder = tmp_path / f"dst-{counted}{number}"
        recorded = {path.name.removesuffix(".json") for path in (folder / ".parts").glob("[!.]*.json")}
        assert len(recorded) == (0 if number == 2 else 1)
        before = stamps(folder)
        assert run(sources, folder, **settings).digest == undisturbed.digest
        assert {name for name, stamp in before.items() if stamps(folder)[name] == stamp} == recorded
        assert content(folder) == content(tmp_path / "undisturbed")
        assert verify(folder) == []
        assert not list(folder.rglob(".*"))
    assert not list(tmp_path.glob(".*"))  # what was unpacked meanwhile


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard in place: both change when it is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("[!.]*.tar")}
