"""Parquet as on the Hugging Face hub: every image with its label and split, whatever the row groups."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from clae_dist.data.manifest import Manifest
from clae_dist.errors import DataError
from data_prep.sources import parquet
from data_prep.sources.parquet import ParquetFile, ParquetSource
from tests.data_prep.published import make_parquet

Run = Callable[..., Manifest]
NAMES = ["owl", "cat"]  # not in order of the alphabet


def contents(manifest: Manifest) -> dict[str, list[tuple[bytes, int]]]:
    """(image bytes, label) by split, sorted."""
    found: dict[str, list[tuple[bytes, int]]] = {}
    for split, shards in manifest.splits.items():
        for shard in shards:
            data = (manifest.folder / shard.name).read_bytes()
            rows = manifest.index(shard).tolist()
            found.setdefault(split, []).extend((data[offset : offset + size], label) for offset, size, label in rows)
    return {split: sorted(rows) for split, rows in found.items()}


def test_every_image_comes_with_its_label_and_split(tmp_path: Path, encoded: Any, run: Run) -> None:
    images = [encoded(seed) for seed in range(60)]
    labels = [seed % 2 for seed in range(60)]
    folder = tmp_path / "set"
    make_parquet(folder / "data" / "train-00000-of-00002.parquet", images[:25], labels[:25], NAMES, group=7)
    make_parquet(folder / "data" / "train-00001-of-00002.parquet", images[25:50], labels[25:50], NAMES, group=100)
    make_parquet(folder / "data" / "validation-00000-of-00001.parquet", images[50:], labels[50:], NAMES)
    (folder / "README.md").write_text("a card")
    manifest = run(folder, tmp_path / "dst", shard_samples=11, num_workers=1)
    assert manifest.classes == ("owl", "cat")  # labels are the file's
    rows = list(zip(images, labels, strict=True))
    assert contents(manifest) == {"train": sorted(rows[:50]), "test": sorted(rows[50:])}
    assert manifest.preparation["pixels"] == "original encoded bytes"


def test_pieces_of_large_row_groups_are_shuffled_and_read_in_order(
    tmp_path: Path, encoded: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against decoding a row group once for every image in it."""
    monkeypatch.setattr(parquet, "_PIECE", 8)
    images, starts = [encoded(seed) for seed in range(64)], []
    real = ParquetFile._seek

    def counted(self: Any, place: Any, row: int) -> Any:
        pieces = self._pieces
        found = real(self, place, row)
        if self._pieces is not pieces:
            starts.append(place)
        return found

    monkeypatch.setattr(ParquetFile, "_seek", counted)
    path = make_parquet(tmp_path / "a.parquet", images, list(range(64)), group=32)
    manifest = run(path, tmp_path / "dst", test_share=0, shard_samples=16)
    order = [row[2] for shard in manifest.splits["train"] for row in manifest.index(shard).tolist()]
    assert sorted(order) == list(range(64))
    assert all({row // 8 for row in order[at : at + 8]} == {order[at] // 8} for at in range(0, 64, 8))
    assert order[:8] != sorted(order[:8])
    assert len(starts) == 4  # one a shard: each starts within a row group, and none goes back


@pytest.mark.parametrize(
    "names, splits",
    [
        (["train.parquet", "test.parquet"], {"train", "test"}),
        (["default/train/0000.parquet", "default/test/0000.parquet"], {"train", "test"}),
        (["train-0.parquet", "val-0.parquet", "test-0.parquet"], {"train", "val", "test"}),
        (["0000.parquet", "0001.parquet"], {"train", "test"}),  # drawn
        (["test-0.parquet"], {"test"}),
    ],
)
def test_names_give_the_splits(tmp_path: Path, encoded: Any, run: Run, names: list[str], splits: set[str]) -> None:
    for number, name in enumerate(names):
        make_parquet(tmp_path / "set" / name, [encoded(10 * number + seed) for seed in range(4)], [0, 1, 0, 1])
    assert set(run(tmp_path / "set", tmp_path / "dst").splits) == splits


@pytest.mark.parametrize(
    "labels, classes, expected",
    [
        ([0, 5, 5, 0], ("0", "5"), [0, 0, 1, 1]),
        (["b", "a", "b", "a"], ("a", "b"), [0, 0, 1, 1]),
        ([0, None, -1, 0], ("0",), [-1, -1, 0, 0]),
        (None, (), [-1] * 4),
    ],
)
def test_labels_without_names(tmp_path: Path, encoded: Any, run: Run, labels: Any, classes: Any, expected: Any) -> None:
    path = make_parquet(tmp_path / "a.parquet", [encoded(seed) for seed in range(4)], labels)
    manifest = run(path, tmp_path / "dst", test_share=0)
    assert manifest.classes == classes
    assert sorted(label for _, label in contents(manifest)["train"]) == expected


def test_a_split_without_labels_is_said(tmp_path: Path, encoded: Any, run: Run) -> None:
    """The hub writes -1 where a contest keeps the labels of its test split to itself."""
    said: list[str] = []
    make_parquet(tmp_path / "set" / "train.parquet", [encoded(0), encoded(1)], [0, 1], NAMES)
    make_parquet(tmp_path / "set" / "test.parquet", [encoded(2), encoded(3)], [-1, -1], NAMES)
    assert run(tmp_path / "set", tmp_path / "dst", say=said.append).class_counts == {"train": (1, 1), "test": (0, 0)}
    assert "The split test has no labels: its images get -1." in " ".join(said)


def test_classes_without_images_are_said_and_keep_their_labels(tmp_path: Path, encoded: Any, run: Run) -> None:
    said: list[str] = []
    path = make_parquet(tmp_path / "a.parquet", [encoded(0), encoded(1)], [0, 2], ["a", "b", "c", "d"])
    assert run(path, tmp_path / "dst", test_share=0, say=said.append).class_counts == {"train": (1, 0, 1, 0)}
    assert "The source names 2 classes without any image, such as b; their labels are left unused." in said
    assert "set aside" not in " ".join(said)


def test_columns_of_other_names(tmp_path: Path, encoded: Any, run: Run) -> None:
    images = pyarrow.array([encoded(seed) for seed in range(4)], pyarrow.large_binary())
    table = pyarrow.table({"photo": images, "thumb": images, "coarse_label": [0, 0, 1, 1], "fine_label": [0, 1, 2, 3]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match="no column image among photo, thumb, .*; name it with --image-column"):
        ParquetSource((path,)).listing(tmp_path, lambda _: None)
    with pytest.raises(DataError, match="no image bytes in the column fine_label"):
        ParquetSource((path,), image="fine_label").listing(tmp_path, lambda _: None)
    with pytest.raises(DataError, match="has no column kind among"):
        ParquetSource((path,), image="photo", label="kind").listing(tmp_path, lambda _: None)
    fine = run(ParquetSource((path,), image="photo"), tmp_path / "fine", test_share=0)
    assert fine.classes == ("0", "1", "2", "3")
    coarse = run(ParquetSource((path,), image="photo", label="coarse_label"), tmp_path / "coarse", test_share=0)
    assert coarse.class_counts == {"train": (2, 2)}


def test_rows_without_bytes_and_bad_images_are_set_aside(tmp_path: Path, encoded: Any, run: Run) -> None:
    path = make_parquet(tmp_path / "a.parquet", [encoded(0), None, b"GIF89a", encoded(1)], [0, 0, 0, 0])
    assert run(path, tmp_path / "dst", test_share=0, max_bad=0.5).num_samples("train") == 2
    lines = [json.loads(line) for line in (tmp_path / "dst" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [f"a.parquet/row-000000{row}.image" for row in (1, 2)]
    assert lines[0]["reason"] == "the row holds no image bytes"


def test_damaged_files_are_named(tmp_path: Path, encoded: Any, run: Run) -> None:
    path = make_parquet(tmp_path / "a.parquet", [encoded(seed) for seed in range(4)], [0, 1, 0, 1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"a.parquet is no whole Parquet file .*; get it again"):
        run(path, tmp_path / "dst")
    path.write_bytes(whole[:4] + bytes(40) + whole[44:])  # the first page's header
    with pytest.raises(DataError, match=r"a.parquet is damaged in row group 0 .*; get it again"):
        run(path, tmp_path / "dst")


@pytest.mark.parametrize(
    "labels, classes, counts",
    [
        ([3.0, None, 1.0, 3.0], ("1", "3"), (1, 2)),  # as pandas writes integers of which some are missing
        ([[1], [0], [], [1]], ("0", "1"), (1, 2)),
        (["", "b", None, "a"], ("a", "b"), (1, 1)),
    ],
)
def test_labels_of_other_types(tmp_path: Path, encoded: Any, run: Run, labels: Any, classes: Any, counts: Any) -> None:
    said: list[str] = []
    path = make_parquet(tmp_path / "a.parquet", [encoded(seed) for seed in range(4)], labels)
    manifest = run(path, tmp_path / "dst", test_share=0, say=said.append)
    assert (manifest.classes, manifest.class_counts) == (classes, {"train": counts})
    assert f"Images of train without a label (-1): {4 - sum(counts)} of 4." in " ".join(said)


@pytest.mark.parametrize("column", ["class", "target", "Label", "cls"])
def test_label_columns_of_other_names(tmp_path: Path, encoded: Any, run: Run, column: str) -> None:
    """They were not seen, and all images had no label."""
    more = {column: pyarrow.array(["cat", "dog"])}
    path = make_parquet(tmp_path / "a.parquet", [encoded(0), encoded(1)], None, **more)
    assert run(path, tmp_path / "dst", test_share=0).class_counts == {"train": (1, 1)}
    both = make_parquet(tmp_path / "b.parquet", [encoded(0), encoded(1)], None, **more, category=more[column])
    with pytest.raises(DataError, match=f"has the label columns {column}, category; say which"):
        run(both, tmp_path / "other")


def test_columns_that_are_no_labels_are_named(tmp_path: Path, encoded: Any, run: Run) -> None:
    said: list[str] = []
    path = make_parquet(tmp_path / "a.parquet", [encoded(0)], None, caption=pyarrow.array(["a cat"]))
    run(path, tmp_path / "dst", test_share=0, say=said.append)
    text = "The files have no labels (the columns are image, caption; --label-column names another): their images get -1."
    assert text in " ".join(said)


def test_hive_partitions_are_labels_and_splits(tmp_path: Path, encoded: Any, run: Run) -> None:
    places = [
        "split=train/label=10",
        "split=train/label=9",
        "split=test/label=10",
        "split=train/label=__HIVE_DEFAULT_PARTITION__",
    ]
    for number, place in enumerate(places):
        make_parquet(
            tmp_path / "set" / place / "deeper" / "part-0.parquet", [encoded(2 * number), encoded(2 * number + 1)], None
        )
    manifest = run(tmp_path / "set", tmp_path / "dst")
    assert (manifest.classes, manifest.class_counts) == (("9", "10"), {"train": (2, 2), "test": (0, 2)})
    assert manifest.num_samples("train") == 6
    for name in ("test", "train"):  # classes here
        make_parquet(tmp_path / "named" / f"class={name}" / "0.parquet", [encoded(0), encoded(1)], None)
    named = run(tmp_path / "named", tmp_path / "named-dst", test_share=0)
    assert (named.classes, named.class_counts) == (("test", "train"), {"train": (2, 2)})


@pytest.mark.parametrize("names, classes", [([0, 1], ("0", "1")), ({"10": "b", "9": "a"}, ("a", "b"))])
def test_class_names_that_are_no_list_of_texts(tmp_path: Path, encoded: Any, run: Run, names: Any, classes: Any) -> None:
    path = make_parquet(tmp_path / "a.parquet", [encoded(0), encoded(1)], [0, 1], names)
    assert run(path, tmp_path / "dst", test_share=0).classes == classes


@pytest.mark.parametrize(
    "labels, names, expected",
    [
        ([0, 2], ["a", "b"], "names 2 classes, and there is the label 2"),
        ([0.5, 1.0], None, "row 0, has the label 0.5"),
        ([[0], [1, 2]], None, "row 1, has 2 labels in label"),
        ([{"id": 3}] * 2, None, "row 0, has the label {'id': 3} .dict."),
        ([-1, -2], None, "row 1, has the label -2"),
    ],
)
def test_labels_that_cannot_be_meant(tmp_path: Path, encoded: Any, run: Run, labels: Any, names: Any, expected: str) -> None:
    path = make_parquet(tmp_path / "a.parquet", [encoded(0), encoded(1)], labels, names)
    with pytest.raises(DataError, match=expected):
        run(path, tmp_path / "dst")


def test_without_pyarrow_it_says_what_to_install(
    tmp_path: Path, encoded: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_parquet(tmp_path / "a.parquet", [encoded(0)], [0])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"needs pyarrow, which is not installed; pip install 'pyarrow>=17'"):
        run(path, tmp_path / "dst")
