"""Zips: the same shards as from the folder; what is unsafe is refused, what is damaged is set aside and named."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clae_dist.data.manifest import Manifest
from clae_dist.errors import DataError
from tests.data_prep.published import make_zip

Run = Callable[..., Manifest]


@pytest.mark.parametrize("method, top", [(zipfile.ZIP_STORED, ""), (zipfile.ZIP_DEFLATED, ""), (zipfile.ZIP_DEFLATED, "set/")])
def test_a_zip_gives_the_shards_of_its_folder(
    tmp_path: Path, make_folder: Any, run: Run, content: Any, method: int, top: str
) -> None:
    source = make_folder({"train/cat": 4, "train/dog": 4, "test/cat": 2, "test/dog": 2, "__MACOSX": 1})
    path = make_zip(source, tmp_path / "set.zip", method, top)
    (source / "__MACOSX" / "0000.jpg").unlink()
    assert run(path, tmp_path / "a", num_workers=1).digest == run(source, tmp_path / "b").digest
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_zip_and_a_tar_make_one_set(tmp_path: Path, make_folder: Any, archive: Any, run: Any) -> None:
    train = archive(make_folder({"train/cat": 4, "train/dog": 4}), tmp_path / "set-train.tar.gz")
    test = make_zip(make_folder({"test/cat": 2, "test/dog": 2}, "other"), tmp_path / "set-test.zip")
    manifest = run([train, test], tmp_path / "dst")
    assert {split: manifest.num_samples(split) for split in manifest.splits} == {"train": 8, "test": 4}


def with_member(path: Path, data: bytes, name: str = "cat/a.jpg", **fields: Any) -> Path:
    member = zipfile.ZipInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)
    return path


@pytest.mark.parametrize(
    "name", ["../outside.jpg", "cat/../../outside.jpg", "/outside.jpg", "..\\outside.jpg", "C:\\outside.jpg"]
)
def test_members_outside_the_folder_are_refused(tmp_path: Path, encoded: Any, run: Run, name: str) -> None:
    (tmp_path / "in").mkdir()
    path = with_member(tmp_path / "in" / "set.zip", encoded(0), name)
    with pytest.raises(DataError, match=r"set.zip is not safe to unpack: .*outside.jpg.* nothing was written"):
        run(path, tmp_path / "in" / "dst")
    assert os.listdir(tmp_path) == ["in"]
    assert os.listdir(tmp_path / "in") == ["set.zip"]


def test_links_and_other_compressions_are_refused(tmp_path: Path, encoded: Any, run: Run) -> None:
    path = with_member(tmp_path / "a.zip", b"/etc/passwd", external_attr=(stat.S_IFLNK | 0o777) << 16)
    with pytest.raises(DataError, match=r"a.zip holds cat/a.jpg as a link or a device; unpack it"):
        run(path, tmp_path / "dst")
    path = with_member(tmp_path / "b.zip", encoded(0), compress_type=zipfile.ZIP_BZIP2)
    with pytest.raises(
        DataError, match=r"b.zip holds cat/a.jpg compressed by method 12, neither stored nor deflated; unpack it"
    ):
        run(path, tmp_path / "dst")
    path = with_member(tmp_path / "c.zip", encoded(0))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("cat/a.jpg", encoded(1))
    with pytest.raises(DataError, match=r"c.zip holds cat/a.jpg twice"):
        run(tmp_path / "c.zip", tmp_path / "dst")


def test_an_encrypted_zip_is_refused(tmp_path: Path, encoded: Any, run: Run) -> None:
    path = with_member(tmp_path / "set.zip", encoded(0))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    for flags in (6, directory + 8):  # general purpose flags in the member's header and in the directory
        data[flags] |= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"set.zip is encrypted \(cat/a.jpg is\); unpack it with its password"):
        run(path, tmp_path / "dst")


@pytest.mark.parametrize("length", [10, 1000, -30, -1])
def test_a_zip_cut_short_is_refused(tmp_path: Path, make_folder: Any, run: Run, length: int) -> None:
    path = make_zip(make_folder({"cat": 4}), tmp_path / "set.zip")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"set.zip is no whole zip archive .*; get the archive again"):
        run(path, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("where, reason", [("bytes", "damaged: "), ("header", "points at no member"), ("crc", "(CRC)")])
def test_damaged_members_are_set_aside(
    tmp_path: Path, make_folder: Any, run: Run, method: int, where: str, reason: str
) -> None:
    """Guards against bytes that still decode: a stored JPEG with another quantisation table is an image, too."""
    path = make_zip(make_folder({"cat": 4}), tmp_path / "set.zip", method)
    with zipfile.ZipFile(path) as archive:
        member, directory = archive.getinfo("cat/0002.jpg"), archive.start_dir
    data = bytearray(path.read_bytes())
    record = data.index(b"cat/0002.jpg", directory) - 46
    at = {"bytes": member.header_offset + 30 + len(member.filename) + 100, "header": member.header_offset, "crc": record + 16}
    data[at[where]] ^= 0x55
    path.write_bytes(data)
    manifest = run(path, tmp_path / "dst", max_bad=0.5, test_share=0)
    assert manifest.num_samples("train") == 3
    (line,) = (tmp_path / "dst" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "cat/0002.jpg"
    assert reason in json.loads(line)["reason"]


def test_a_member_that_lies_about_its_size_fills_no_memory(tmp_path: Path, make_folder: Any, run: Run) -> None:
    source = make_folder({"cat": 2})
    (source / "cat" / "bomb.png").write_bytes(bytes(50_000_000))
    path = make_zip(source, tmp_path / "set.zip")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        record = data.index(b"cat/bomb.png", archive.start_dir) - 46
    for size, reason in ((1000, "damaged"), (2**32 - 2, "4294967294 bytes, above the limit")):
        data[record + 24 : record + 28] = size.to_bytes(4, "little")
        path.write_bytes(data)
        folder = tmp_path / f"dst-{size}"
        assert run(path, folder, max_bad=0.5, test_share=0).num_samples("train") == 2
        assert reason in (folder / "quarantine.jsonl").read_text()
