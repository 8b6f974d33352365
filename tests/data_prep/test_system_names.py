"""What systems, NAS and file managers leave behind is no class; one name in two forms of Unicode is one class."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clae_dist.data.manifest import Manifest
from data_prep.index import IndexSettings, index
from tests.data_prep.published import make_parquet, make_zip

Run = Callable[..., Manifest]
Folder = Callable[..., Path]

FOLDERS = ["@eaDir", "#recycle", "@Recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information", "__MACOSX"]
FOLDERS += [".ipynb_checkpoints", ".Trash-1000"]
FILES = ["Thumbs.db", "desktop.ini", ".DS_Store", "cat/._0000.jpg", "cat/.hidden.png"]


@pytest.mark.parametrize("packed", [False, True])
def test_they_are_skipped_and_counted(tmp_path: Path, make_folder: Folder, run: Run, content: Any, packed: bool) -> None:
    said: list[str] = []
    plain = make_folder({"cat": 2, "dog": 2}, "plain")
    source = tmp_path / "src"
    shutil.copytree(plain, source)
    for folder in FOLDERS:  # as a NAS does: thumbnails, deleted images
        shutil.copytree(plain / "cat", source / folder / "0000.jpg")
        shutil.copytree(plain / "cat", source / "dog" / folder)
    for name in FILES:
        (source / name).write_bytes(b"not an image")
    path = make_zip(source, tmp_path / "set.zip") if packed else source
    manifest = run(path, tmp_path / "dst", test_share=0, say=said.append)
    assert manifest.class_counts == {"train": (2, 2)}
    run(plain, tmp_path / "plain-dst", test_share=0)
    assert content(tmp_path / "dst") == content(tmp_path / "plain-dst")
    text = " ".join(said)
    assert f"Hidden folders and a system's own, skipped: {2 * len(FOLDERS)}, such as " in text
    assert f"{len(FILES)} files are no images by their names" in text


def test_a_folder_of_shards_on_macos(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    run(make_folder({"cat": 2}), tmp_path / "dst", test_share=0)
    (shards := tmp_path / "shards").mkdir()
    shutil.copy(tmp_path / "dst" / "train-000000.tar", shards / "a.tar")
    (shards / "._a.tar").write_bytes(b"Mac OS X        ")
    assert index([str(shards)], None, IndexSettings(), num_workers=0, say=lambda _: None).num_samples("train") == 2


NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("places", [(f"{NFC}", f"{NFD}"), (f"train/{NFC}", f"test/{NFD}")])
def test_two_forms_of_one_name_are_one_class(tmp_path: Path, make_folder: Folder, run: Run, places: tuple[str, str]) -> None:
    said: list[str] = []
    source = make_folder({places[0]: 2, places[1]: 3, places[0].replace(NFC, "bar"): 1, places[1].replace(NFD, "bar"): 1})
    manifest = run(source, tmp_path / "dst", test_share=0, say=said.append)
    assert manifest.classes == ("bar", NFC)
    counts = manifest.class_counts
    assert [sum(count[1] for count in counts.values()), sum(map(sum, counts.values()))] == [5, 6 + (places[0] != NFC)]
    assert f"The class {NFC} is spelled in two forms of Unicode" in " ".join(said)
    assert "has no images of" not in " ".join(said)


def test_a_name_in_one_form_stays_as_it_is(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    """So that a set that exists keeps its digest."""
    assert run(make_folder({NFD: 2, "bar": 2}), tmp_path / "dst").classes == ("bar", NFD)


def test_two_forms_in_parquet_files(tmp_path: Path, encoded: Any, run: Run) -> None:
    path = make_parquet(tmp_path / "a.parquet", [encoded(seed) for seed in range(3)], [NFC, NFD, "bar"])
    assert run(path, tmp_path / "dst", test_share=0).class_counts == {"train": (1, 2)}
