"""Splits that a source has are kept, whatever they are called; no test split is drawn from images that were split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clae_dist.data.manifest import Manifest
from clae_dist.errors import DataError
from data_prep.sources import open_source
from data_prep.split_names import files_by_split, splits_of
from tests.data_prep.published import make_parquet, make_zip
from tests.data_prep.test_prepare import read_all

Run = Callable[..., Manifest]
Folder = Callable[..., Path]

PAIRS = [
    ("Train", "Test"),
    ("TRAIN", "VAL"),
    ("training", "testing"),
    ("Training", "Validation"),
    ("train", "dev"),
    ("train", "eval"),
    ("train", "Evaluation"),
    ("seg_train", "seg_test"),
    ("train2017", "val2017"),
    ("TrainImages", "TestImages"),
    ("Training Set", "Test Set"),
]


@pytest.mark.parametrize(
    "train, test, inside", [*((*pair, "") for pair in PAIRS), ("Train", "Test", "data/"), ("seg_train", "seg_test", "a/b/")]
)
def test_other_spellings_are_splits(
    tmp_path: Path, make_folder: Folder, run: Run, content: Any, train: str, test: str, inside: str
) -> None:
    """Guards against two classes, train and test, with a test split drawn from both."""
    source = make_folder({f"{inside}{train}/{kind}": 2 for kind in ("cat", "dog")} | {f"{inside}{test}/cat": 1})
    manifest = run(source, tmp_path / "dst")
    assert (manifest.classes, manifest.preparation["splits_from"]) == (("cat", "dog"), "source")
    assert {split: manifest.num_samples(split) for split in manifest.splits} == {"train": 4, "test": 1}
    plain = make_folder({"train/cat": 2, "train/dog": 2, "test/cat": 1}, "plain")
    assert manifest.digest == run(plain, tmp_path / "plain-dst").digest


@pytest.mark.parametrize("name", ["test", "Testing", "val", "evaluation", "my-test"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_held_out_split_alone_is_not_split_again(
    tmp_path: Path, make_folder: Folder, archive: Any, run: Run, name: str, packed: bool
) -> None:
    source = make_folder({f"{name}/cat": 12, f"{name}/dog": 12})
    said: list[str] = []
    manifest = run(archive(source, tmp_path / "set.tar", "w") if packed else source, tmp_path / "dst", say=said.append)
    assert (manifest.classes, manifest.preparation["splits_from"]) == (("cat", "dog"), "source")
    assert "The source has no train split" in " ".join(said)
    assert {split: manifest.num_samples(split) for split in manifest.splits} == {"test": 24}


def test_a_train_split_alone_is_said(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    said: list[str] = []
    assert run(make_folder({"Train/cat": 10}), tmp_path / "dst", say=said.append).num_samples("test") == 1
    assert "train split only: what is drawn for the test split comes from it" in " ".join(said)


def test_splits_without_class_folders_have_no_labels(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    said: list[str] = []
    manifest = run(make_folder({"train": 3, "test": 2}), tmp_path / "dst", say=said.append)
    assert {label for _, _, label in read_all(manifest).values()} == {-1}
    assert (manifest.num_samples("train"), manifest.num_samples("test")) == (3, 2)
    assert "they get no labels (-1)" in " ".join(said)


def test_a_folder_twice_is_one(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    """As archives of archives are unpacked: seg_train/seg_train/CLASS."""
    source = make_folder({"seg_train/seg_train/cat": 2, "seg_test/seg_test/cat": 1})
    assert run(source, tmp_path / "dst").class_counts == {"train": (2,), "test": (1,)}


@pytest.mark.parametrize(
    "counts, expected",
    [
        ({"train_images": 3, "test_photos": 3}, "no class folders that are not called like splits"),
        ({"train": 3, "test_images": 3}, "no class folders that are not called like splits"),
        ({"test_images": 3}, "no class folders that are not called like splits"),
        ({"cat": 2, "dog": 2, "test/cat": 1, "test/dog": 1}, "has test/, which holds folders of images, beside class folders"),
        ({"cat": 2, "Train/cat": 2}, "has Train/, which holds folders of images, beside class folders"),
        ({"cat/train": 2, "cat/test": 1, "dog/train": 2}, "the split folders cat/test and cat/train inside of a class"),
        ({"cat": 2, "cat/val": 1, "dog": 2}, "the split folder cat/val inside of a class folder"),
        ({"data/train/cat": 2, "data/test/cat": 1, "more/cat": 1}, "split folders data/test and data/train inside"),
        ({"train/cat": 1, "Training/cat": 1, "test/cat": 1}, "has Training and train, which mean the same"),
        ({"Train/cat": 2, "test/cat": 1, "extra/cat": 1}, "and also images in extra"),
    ],
)
def test_splits_that_cannot_be_told_are_refused(
    tmp_path: Path, make_folder: Folder, run: Run, counts: Any, expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        run(make_folder(counts), tmp_path / "dst")
    assert not (tmp_path / "dst" / "manifest.json").exists()


def test_classes_may_be_called_like_splits(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    said: list[str] = []
    source = make_folder({"train": 3, "car": 3, "bullet_train": 3, "car/train": 1})
    assert run(source, tmp_path / "dst", say=said.append).classes == ("bullet_train", "car", "train")
    assert "The folder train/ is taken for a class" in " ".join(said)


def test_labels_in_files_are_not_lost_without_a_word(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    said: list[str] = []
    source = make_folder({".": 2})
    for name in ("metadata.csv", "0000.cls"):
        (source / name).write_text("1")
    run(source, tmp_path / "dst", say=said.append)
    assert "metadata.csv is not read: classes are folders' names." in " ".join(said)
    assert f"{source} looks like WebDataset shards (0000.cls): `python -m data_prep index` keeps their labels." in " ".join(
        said
    )


def test_one_class_is_said(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    said: list[str] = []
    assert run(make_folder({"images/cat": 3, "images/dog": 3}), tmp_path / "dst", say=said.append).classes == ("images",)
    assert "All images are of one class, images: " in " ".join(said)


def test_archives_whose_names_are_splits(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    train = make_zip(make_folder({"pets/cat": 3, "pets/dog": 3}, "one"), tmp_path / "pets-train.zip")
    test = make_zip(make_folder({"pets/cat": 1, "pets/dog": 2}, "two"), tmp_path / "pets-Test.zip")
    assert run([train, test], tmp_path / "dst").class_counts == {"train": (3, 3), "test": (1, 2)}
    with pytest.raises(DataError, match=r"other\.zip and pets-Test\.zip do not tell their splits by their names"):
        run([train.rename(tmp_path / "other.zip"), test], tmp_path / "other")


def test_parquet_files_named_otherwise(tmp_path: Path, encoded: Any, run: Run) -> None:
    """Neither name begins with its split: all images became train, and a test split was drawn from them."""
    for number, name in enumerate(("food_train", "food-TESTING")):
        make_parquet(tmp_path / "set" / f"{name}.parquet", [encoded(10 * number + seed) for seed in range(4)], [0, 1, 0, 1])
    manifest = run(tmp_path / "set", tmp_path / "dst")
    assert (manifest.class_counts, manifest.preparation["splits_from"]) == ({"train": (2, 2), "test": (2, 2)}, "source")
    (tmp_path / "set" / "food-TESTING.parquet").rename(tmp_path / "set" / "test-train.parquet")
    with pytest.raises(DataError, match=r"test-train\.parquet names test and train; which one is it"):
        run(tmp_path / "set", tmp_path / "other")


def test_the_names() -> None:
    assert files_by_split(["a/train-0.parquet", "eval/0.parquet", "test/my-training.parquet", "b/0.parquet"]) == {
        "a/train-0.parquet": "train",
        "eval/0.parquet": "test",
        "test/my-training.parquet": "train",
        "b/0.parquet": "",
    }
    assert splits_of(["bullet_train", "test_tube"]) == splits_of(["cat", "train"]) == splits_of(["latest"]) == {}


def test_an_archive_in_a_folder_of_its_splits(tmp_path: Path, make_folder: Folder, archive: Any) -> None:
    """Its leading folder says the split: stripped, a test split would be drawn from the images for testing."""
    source = make_folder({"cifar-test/cat": 2, "cifar-test/dog": 2})
    listing = open_source([archive(source, tmp_path / "x.tar", "w")]).listing(tmp_path, lambda _: None)
    assert {entry.path.split("/")[0] for entry in listing.entries} == {"cifar-test"}  # type: ignore[union-attr]
