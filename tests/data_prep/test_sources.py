"""Which kind of source it is, told by the content; and what makes no set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clae_dist.errors import DataError
from data_prep.__main__ import main
from data_prep.sources import open_source
from data_prep.sources.entry import origin_of
from tests.data_prep.published import WNIDS, make_cifar, make_imagenet, make_parquet, make_zip


@pytest.fixture
def sources(tmp_path: Path, make_folder: Any, archive: Any, encoded: Any) -> dict[str, Path]:
    """One of each kind, by names that say nothing."""
    folder = make_folder({"cat": 2}, "a-folder")
    rows = {"train.bin": np.zeros((1, 32, 32, 3), np.uint8), "test.bin": np.zeros((1, 32, 32, 3), np.uint8)}
    imagenet = make_imagenet(tmp_path / "ilsvrc", {WNIDS[0]: [encoded(0)]}, [(WNIDS[0], encoded(1))])
    return {
        "FolderSource": folder,
        "ArchiveSource": archive(folder, tmp_path / "b.data"),
        "ImageNetSource": imagenet["train"].rename(tmp_path / "c.data"),
        "CifarSource": make_cifar(tmp_path / "d.data", 100, rows, {"train.bin": [0], "test.bin": [0]}),
        "ParquetSource": make_parquet(tmp_path / "e.data", [encoded(0)], [0]),
        "zip": make_zip(folder, tmp_path / "f.data"),
    }


def test_the_content_tells_the_kind(sources: dict[str, Path]) -> None:
    for kind, path in sources.items():
        assert type(open_source([path])).__name__ == kind.replace("zip", "ArchiveSource")
    both = open_source([sources["ArchiveSource"], sources["zip"]])
    assert origin_of(both) == "b.data and f.data"


def test_a_folder_of_images_is_that_whatever_else_it_holds(tmp_path: Path, sources: dict[str, Path]) -> None:
    (sources["FolderSource"] / "metadata.parquet").write_bytes(sources["ParquetSource"].read_bytes())
    (sources["FolderSource"] / "ILSVRC2012_img_train.tar").write_bytes(b"")
    assert type(open_source([sources["FolderSource"]])).__name__ == "FolderSource"


@pytest.mark.parametrize(
    "kinds, expected",
    [
        ("ArchiveSource FolderSource", r"a-folder is a folder, and 2 sources are named; several must be files of one set"),
        ("ArchiveSource ParquetSource", r"e.data makes no set together with b.data; name what belongs together"),
        ("CifarSource CifarSource zip", r"d.data makes no set together with f.data"),
        ("zip ImageNetSource", r"c.data makes no set together with f.data"),
    ],
)
def test_what_makes_no_set(sources: dict[str, Path], kinds: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        open_source([sources[kind] for kind in kinds.split()])


def test_columns_are_for_parquet(tmp_path: Path, sources: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", str(sources["FolderSource"]), str(tmp_path / "dst"), "--workers", "0", "--label-column", "label"]
    assert main(words) == 2
    assert "--label-column is given, but" in capsys.readouterr().err


def test_several_sources_on_the_command_line(
    tmp_path: Path, make_folder: Any, archive: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    train = archive(make_folder({"train/cat": 4, "train/dog": 4}, "one"), tmp_path / "pets-train.tar.gz")
    test = make_zip(make_folder({"test/cat": 2, "test/dog": 2}, "two"), tmp_path / "pets-test.zip")
    assert main(["prepare", str(train), str(test), str(tmp_path / "dst"), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "pets: 12 images, 2 classes, 2 shards." in said
    assert main(["info", str(tmp_path / "dst")]) == 0
    assert "source:      pets-train.tar.gz and pets-test.zip\n" in capsys.readouterr().out
