"""What is said where data.shards names something else: it sent users to write shards into their folder of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clae_dist.data.manifest import load_manifest
from clae_dist.errors import DataError


def image_folder(path: Path) -> None:
    (path / "cat").mkdir(parents=True)
    (path / "cat" / "1.jpg").touch()


def tars(path: Path) -> None:
    path.mkdir()
    for number in range(2):
        (path / f"x-{number:06d}.tar").touch()


def prepared_below(path: Path) -> None:
    (path / "shards").mkdir(parents=True)
    (path / "shards" / "manifest.json").touch()


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        (
            "nowhere",
            lambda path: None,
            "HERE is not a folder; name the folder that `python -m data_prep prepare IMAGES SHARDS` wrote",
        ),
        ("empty", Path.mkdir, "HERE is empty; name the folder"),
        ("images", image_folder, "into another folder and name that one: `python -m data_prep prepare HERE SHARDS`"),
        (
            "theirs",
            tars,
            "HERE has no manifest.json, but 2 tars: if these are WebDataset shards, `python -m data_prep index HERE`",
        ),
        ("run", prepared_below, "HERE has no manifest.json, but HERE/shards has one; name that folder"),
        ("x.tar.gz", Path.touch, "HERE is compressed, .* 'data.shards=pipe:gzip -dc HERE', or"),
        ("x.tar.xz", Path.touch, "'data.shards=pipe:xz -dc HERE', or"),
        ("x.zip", Path.touch, "HERE is a file, neither a folder with a manifest.json nor a shard"),
    ],
)
def test_what_is_no_folder_with_a_manifest(tmp_path: Path, name: str, make: Callable[[Path], None], says: str) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(DataError, match=says.replace("HERE", str(path)).replace("(", r"\(")) as error:
        load_manifest(path)
    assert f"prepare SRC {path}" not in str(error.value)
