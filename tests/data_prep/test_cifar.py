"""CIFAR's binary archives: every pixel and label comes through; Python's pickles are refused."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clae_dist.data.decode import decode_rgb
from clae_dist.data.manifest import Manifest
from clae_dist.errors import DataError
from tests.data_prep.published import CIFAR_CLASSES, add, make_cifar

Run = Callable[..., Manifest]
FILES = {
    10: [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"],
    100: ["train.bin", "test.bin"],
}


def made(path: Path, kind: int) -> tuple[Path, dict[str, np.ndarray], dict[str, list[int]]]:
    rng = np.random.default_rng(kind)
    rows = {name: rng.integers(0, 256, (3, 32, 32, 3), np.uint8) for name in FILES[kind]}
    labels = {name: [2, 0, 1] for name in rows}
    return make_cifar(path, kind, rows, labels), rows, labels


@pytest.mark.parametrize("kind", [10, 100])
def test_every_pixel_and_label_comes_through(tmp_path: Path, run: Run, kind: int) -> None:
    path, rows, labels = made(tmp_path / "any-name.tar.gz", kind)
    manifest = run(path, tmp_path / "dst", num_workers=1)
    assert manifest.classes == CIFAR_CLASSES[kind]
    assert manifest.preparation["pixels"] == "PNG of raw pixels"
    for split, shards in manifest.splits.items():
        found = []
        for shard in shards:
            data = (manifest.folder / shard.name).read_bytes()
            for offset, size, label in manifest.index(shard).tolist():
                found.append((decode_rgb(data[offset : offset + size]).permute(1, 2, 0).numpy().tobytes(), label))
        names = [name for name in rows if ("test" in name) == (split == "test")]
        assert sorted(found) == sorted(
            (image.tobytes(), label) for name in names for image, label in zip(rows[name], labels[name], strict=True)
        )


@pytest.mark.parametrize(
    "folder, wanted", [("cifar-10-batches-py", "cifar-10-binary.tar.gz"), ("cifar-100-python", "cifar-100-binary.tar.gz")]
)
def test_pickles_are_refused_and_never_read(tmp_path: Path, run: Run, folder: str, wanted: str) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harm",)

    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as tar:
        add(tar, f"{folder}/data_batch_1", pickle.dumps(Harm()))
    with pytest.raises(DataError, match=f"holds Python pickles, which can run any code .*; get {wanted} instead"):
        run(tmp_path / "set.tar.gz", tmp_path / "dst")
    assert not (tmp_path / "harm").exists()


def test_archives_that_are_not_whole(tmp_path: Path, run: Run) -> None:
    path, rows, labels = made(tmp_path / "cifar.tar.gz", 100)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is damaged"):
        run(path, tmp_path / "dst")
    make_cifar(path, 100, rows, {**labels, "test.bin": [0, 1, 3]})
    with pytest.raises(DataError, match=r"has the label 3 in test.bin and 3 classes"):
        run(path, tmp_path / "dst")
    make_cifar(path, 100, {"train.bin": rows["train.bin"]}, labels)
    with pytest.raises(DataError, match=r"has no test.bin"):
        run(path, tmp_path / "dst")
    make_cifar(path, 100, {**rows, "test.bin": rows["test.bin"][:, :31]}, labels)
    with pytest.raises(DataError, match=r"bytes in test.bin, which are no whole rows of 3074"):
        run(path, tmp_path / "dst")
