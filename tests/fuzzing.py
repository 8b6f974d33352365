"""Runs mutations in a process of its own, so that one that hangs or kills the interpreter is named: `fuzz(kind, …)`.

The process is `python -m tests.fuzzing KIND SEED FIRST COUNT LIMIT_S FOLDER`; mutation n of a seed is always the same.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests import processes
from tests.mutations import compress, damage_header, mutate, sample_images, sample_tar

_IMAGES = sample_images()


def fuzz(kind: str, count: int, folder: Path, seed: int = 0, limit_s: float = 60.0) -> dict[str, int]:
    """Runs the mutations and returns how many ended in which way. Fails with the number of the one that did not end well.

    `limit_s` is for one mutation; it takes milliseconds, but the machine may be busy.
    """
    words = ["-X", "faulthandler", "-m", "tests.fuzzing", kind, seed, 0, count, limit_s, folder]
    print(f"{count} mutations of seed {seed}:", *words)
    done = processes.run(sys.executable, *words, timeout=None)
    lines = done.stdout.splitlines()
    if done.returncode != 0:
        number = next((line for line in reversed(lines) if line.isdecimal()), "?")
        raise AssertionError(f"{kind}: mutation {number} of seed {seed} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    ends: dict[str, int] = json.loads(lines[-1])
    assert sum(ends.values()) == count
    return ends


def image(rng: np.random.Generator, folder: Path) -> str:
    """What passes `inspect` has the same size from `decode_rgb`; what does not is a DecodeError or pixels, nothing else."""
    from clae_dist.data.decode import DecodeError, decode_rgb, inspect

    data = mutate(rng, _IMAGES[int(rng.integers(len(_IMAGES)))], _IMAGES)
    found = inspect(data, max_pixels=1e6)
    if "million pixels" in found.problem:
        return "too large"
    try:
        height, width = decode_rgb(data).shape[1:]
    except DecodeError:
        if not found.problem:
            raise
        return "refused"
    if not found.problem:
        assert sorted((height, width)) == sorted((found.height, found.width)), (height, width, found)
        return "accepted"
    return "decoded although refused"


def archive(rng: np.random.Generator, folder: Path) -> str:
    """Images in are images kept and images set aside, or the archive is refused; nothing is written but the set."""
    from clae_dist.errors import DataError
    from data_prep.prepare import prepare
    from data_prep.settings import PrepareSettings
    from data_prep.sources import open_source
    from data_prep.verify import verify

    box = folder / "outside" / "box"
    if not box.exists():
        box.mkdir(parents=True)
        (folder / "outside" / "sentinel.jpg").write_bytes(b"untouched")
    path, target = box / "set.tar", box / "deep" / "dst"
    target.parent.mkdir(exist_ok=True)
    images = [mutate(rng, one) if rng.random() < 0.3 else one for one in _IMAGES]
    data = sample_tar(rng, images, str(folder / "outside"))
    for way, share in ((damage_header, 0.5), (mutate, 0.3), (compress, 0.3), (mutate, 0.3)):
        data = way(rng, data) if rng.random() < share else data
    path.write_bytes(data)
    settings = PrepareSettings("set", "fuzz", test_share=0, max_pixels=10**6)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress
            manifest = prepare(open_source((path,)), target, settings, max_bad=1, num_workers=0, say=lambda _: None)
    except DataError:
        left = sorted(path.name for path in target.iterdir()) if target.exists() else []
        assert not set(left) - {"plan.json", "quarantine.jsonl", ".parts"}, left  # of a set without a single good image
        end = "refused"
    else:
        kept = sum(manifest.num_samples(split) for split in manifest.splits)
        assert kept + manifest.quarantined == _num_images(path), (kept, manifest.quarantined, _num_images(path))
        assert verify(target) == []
        end = "prepared"
    found = {str(item.relative_to(folder)) for item in folder.rglob("*") if not item.is_relative_to(target)}
    assert found == {f"outside{rest}" for rest in ("", "/sentinel.jpg", "/box", "/box/set.tar", "/box/deep")}, found
    assert (folder / "outside" / "sentinel.jpg").read_bytes() == b"untouched"
    shutil.rmtree(target, ignore_errors=not target.exists())
    return end


def _num_images(path: Path) -> int:
    """Different names of images in an archive, by tarfile alone."""
    from clae_dist.data.image_names import is_image_name

    with tarfile.open(path) as tar:
        members = [member for member in tar if not member.isdir()]
    parts = [[part for part in member.name.split("/") if part not in ("", ".")] for member in members]
    hidden = [any(part.startswith(".") or part == "__MACOSX" for part in path) for path in parts]
    return len({tuple(path) for path, skip in zip(parts, hidden, strict=True) if path and not skip and is_image_name(path[-1])})


def prepared_set(rng: np.random.Generator, folder: Path) -> str:
    """A damaged file of a prepared set: verify names it; loading and reading it give a DataError or what was there."""
    from clae_dist.data.manifest import load_manifest
    from clae_dist.data.shards import ShardReader
    from clae_dist.data.synthetic import write_synthetic_set
    from clae_dist.errors import DataError
    from data_prep.verify import verify

    home = folder / "set"
    if not home.exists():
        write_synthetic_set(home, 4, 24, num_shards=2)
        assert verify(home) == []
    paths = sorted(home.iterdir())
    path = paths[int(rng.integers(len(paths)))]
    before = path.read_bytes()
    data = damage_header(rng, before) if path.suffix == ".tar" and rng.random() < 0.3 else mutate(rng, before)
    signed = path.suffix == ".json" and rng.random() < 0.5
    if signed:  # a manifest that another program made, which has a digest of its own
        data = _sign_again(rng, before)
    try:
        path.write_bytes(data)
        differences = verify(home)
        same = signed or data == before or (path.suffix == ".json" and _same_json(data, before))
        assert same or any(path.name in line for line in differences), (path.name, differences)
        try:
            manifest = load_manifest(home)
            for split in manifest.splits:
                reader = ShardReader(manifest, split)
                for shard, size in enumerate(reader.sizes):
                    for row in range(size):
                        reader.read(shard, row)
        except DataError:
            return f"{path.suffix} refused"
        return f"{path.suffix} read"
    finally:
        path.write_bytes(before)


def _same_json(data: bytes, before: bytes) -> bool:
    """Whether two manifests say the same but for the time, which nothing depends on."""
    try:
        one, other = json.loads(data), json.loads(before)
        return {**one, "created": ""} == {**other, "created": ""}
    except (ValueError, TypeError, RecursionError):
        return False


def _sign_again(rng: np.random.Generator, before: bytes) -> bytes:
    """A manifest with one value replaced by something of another kind, and the digest that goes with it."""
    content = json.loads(before)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(content)
    node, key = places[int(rng.integers(len(places)))]
    values = (None, -1, 10**30, 1.5, "", "../" * 9, "\ud800", [], {}, [[]], {"a": 1}, True, ["train-000000.tar"])
    node[key] = values[int(rng.integers(len(values)))]
    rest = {key: value for key, value in content.items() if key not in ("created", "digest")}
    content["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps(content).encode()


def run_files(rng: np.random.Generator, folder: Path) -> str:
    """A damaged file of a run: see tests/run_files.py."""
    from tests.run_files import damage

    with contextlib.redirect_stdout(io.StringIO()):  # of damaged checkpoints
        return damage(rng, folder)


def hangs_at_3(rng: np.random.Generator, folder: Path) -> str:
    """For the test of this file: a wait that no Python code can end."""
    if len(list(folder.iterdir())) == 3:
        threading.Event().wait()
    return _one_more(folder)


def dies_at_3(rng: np.random.Generator, folder: Path) -> str:
    """For the test of this file: what a fault in a decoder does."""
    if len(list(folder.iterdir())) == 3:
        os.abort()
    return _one_more(folder)


def _one_more(folder: Path) -> str:
    (folder / str(len(list(folder.iterdir())))).touch()
    return "done"


KINDS: dict[str, Callable[[np.random.Generator, Path], str]] = {
    kind.__name__: kind for kind in (image, archive, prepared_set, run_files, hangs_at_3, dies_at_3)
}


def main(kind: str, seed: int, first: int, count: int, limit_s: float, folder: Path) -> None:
    ends: dict[str, int] = {}
    for number in range(first, first + count):
        print(number, flush=True)
        faulthandler.dump_traceback_later(limit_s, exit=True)  # a thread in C: works in a hang, too
        end = KINDS[kind](np.random.default_rng([seed, number]), folder)
        faulthandler.cancel_dump_traceback_later()
        ends[end] = ends.get(end, 0) + 1
    print(json.dumps(ends))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), Path(sys.argv[6]))
