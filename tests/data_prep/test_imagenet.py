"""ImageNet's own archives: the shards that the unpacked folders give, without unpacking."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clae_dist.data.manifest import Manifest
from clae_dist.errors import DataError
from tests.data_prep.published import WNIDS, add, make_imagenet

Run = Callable[..., Manifest]


@pytest.fixture
def archives(tmp_path: Path, encoded: Any) -> dict[str, Path]:
    images = {wnid: [encoded(10 * first + number) for number in range(4)] for first, wnid in enumerate(reversed(WNIDS))}
    val = [(WNIDS[number % 3], encoded(100 + number)) for number in range(6)]
    return make_imagenet(tmp_path / "ilsvrc", images, val)


@pytest.fixture
def unpacked(tmp_path: Path, archives: dict[str, Path]) -> Path:
    """train/WNID/ and val/WNID/, as the scripts that everybody uses unpack them."""
    root = tmp_path / "unpacked"
    with tarfile.open(archives["train"]) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                inner.extractall(root / "train" / member.name.removesuffix(".tar"), filter="data")
    with tarfile.open(archives["val"]) as tar:
        for number, member in enumerate(tar):
            tar.extract(member, root / "val" / WNIDS[number % 3], filter="data")
    return root


def test_train_and_val_are_one_set_with_the_shards_of_the_unpacked_folders(
    tmp_path: Path, archives: dict[str, Path], unpacked: Path, run: Run, content: Any
) -> None:
    manifest = run(list(archives.values()), tmp_path / "a", num_workers=1)
    assert manifest.classes == WNIDS
    assert manifest.class_counts == {"train": (4, 4, 4), "test": (2, 2, 2)}
    assert manifest.digest == run(unpacked, tmp_path / "b").digest
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert run(tmp_path / "ilsvrc", tmp_path / "c").digest == manifest.digest  # the folder that holds the archives


def test_each_archive_alone(tmp_path: Path, archives: dict[str, Path], run: Run) -> None:
    said: list[str] = []
    train = run(archives["train"], tmp_path / "train", test_share=0.25)
    assert train.class_counts == {"train": (3, 3, 3), "test": (1, 1, 1)}
    labelled = run([archives["devkit"], archives["val"]], tmp_path / "labelled")
    assert (labelled.classes, labelled.class_counts) == (WNIDS, {"test": (2, 2, 2)})
    val = run(archives["val"], tmp_path / "val", test_share=0, say=said.append)
    assert (val.classes, val.num_samples("train")) == ((), 6)
    assert "get no labels (-1); name ILSVRC2012_devkit_t12.tar.gz, too" in " ".join(said)


def test_archives_that_need_another_one(tmp_path: Path, archives: dict[str, Path], run: Run) -> None:
    with pytest.raises(DataError, match=r"val.tar has no labels, and the train images have; name ILSVRC2012_devkit_t12.tar.gz"):
        run([archives["train"], archives["val"]], tmp_path / "dst")
    with pytest.raises(DataError, match=r"holds the labels of val only; name ILSVRC2012_img_val.tar, too"):
        run([archives["train"], archives["devkit"]], tmp_path / "dst")
    archives["devkit"].rename(tmp_path / "elsewhere.tar.gz")
    with pytest.raises(DataError, match=r"makes no set together with"):
        run([archives["train"], archives["train"]], tmp_path / "dst")


def test_cut_short_wherever_it_is_cut(tmp_path: Path, archives: dict[str, Path], run: Run) -> None:
    whole = archives["train"].read_bytes()
    for length in range(1024, len(whole) - 10240, 512):  # the padding at the end of a tar holds nothing
        archives["train"].write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"is cut short or damaged|is no whole tar"):
            run(archives["train"], tmp_path / "dst")
    assert sorted(os.listdir(tmp_path)) == ["ilsvrc"]


def test_a_damaged_header_inside_a_class_is_noticed(tmp_path: Path, archives: dict[str, Path], run: Run) -> None:
    data = bytearray(archives["train"].read_bytes())
    data[data.index(f"{WNIDS[1]}_2.JPEG".encode())] ^= 1
    archives["train"].write_bytes(data)
    with pytest.raises(DataError, match="cut short or damaged after 2 members"):
        run(archives["train"], tmp_path / "dst")


def test_a_devkit_of_another_val(tmp_path: Path, archives: dict[str, Path], encoded: Any, run: Run) -> None:
    others = make_imagenet(tmp_path / "other", {WNIDS[0]: [encoded(0)]}, [(WNIDS[0], encoded(1))])
    with pytest.raises(DataError, match=r"holds ILSVRC2012_val_00000002.JPEG, and the devkit has 1 labels"):
        run([archives["val"], others["devkit"]], tmp_path / "dst")
    with pytest.raises(DataError, match=r"holds 1 images, and the devkit has 6 labels"):
        run([others["val"], archives["devkit"]], tmp_path / "dst")
    with tarfile.open(others["devkit"], "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", b"not of Matlab")
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"1\n")
    with pytest.raises(DataError, match=r"devkit_t12.tar.gz cannot be read .*; get the archive again"):
        run([others["val"], others["devkit"]], tmp_path / "dst")
