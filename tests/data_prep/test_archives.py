"""Archives: the same shards as from the folder, and nothing written for those that are unsafe or damaged."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clae_dist.data.manifest import Manifest
from clae_dist.errors import DataError

Run = Callable[..., Manifest]


@pytest.mark.parametrize("mode, suffix", [("w", "tar"), ("w:gz", "tar.gz"), ("w:bz2", "tar.bz2"), ("w:xz", "tar.xz")])
def test_an_archive_gives_the_shards_of_its_folder(
    tmp_path: Path, make_folder: Any, archive: Any, run: Run, content: Any, mode: str, suffix: str
) -> None:
    source = make_folder({"train/cat": 4, "train/dog": 4, "test/cat": 2, "test/dog": 2})
    path = archive(source, tmp_path / f"set.{suffix}", mode)
    assert run(path, tmp_path / "a").digest == run(source, tmp_path / "b").digest
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]  # nothing unpacked is left


def test_a_leading_folder_is_no_class(tmp_path: Path, make_folder: Any, archive: Any, run: Run, content: Any) -> None:
    make_folder({"images/cat": 4, "images/dog": 4}, "outer")
    path = archive(tmp_path / "outer", tmp_path / "set.tar")
    assert run(path, tmp_path / "a").classes == ("cat", "dog")
    run(tmp_path / "outer" / "images", tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def with_member(path: Path, member: tarfile.TarInfo, data: bytes = b"") -> Path:
    member.size = len(data)
    with tarfile.open(path, "w") as tar:
        tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", ["../outside.jpg", "cat/../../outside.jpg"])
def test_members_outside_the_folder_are_refused(tmp_path: Path, encoded: Any, run: Run, name: str) -> None:
    (tmp_path / "in").mkdir()
    path = with_member(tmp_path / "in" / "set.tar", tarfile.TarInfo(name), encoded(0))
    with pytest.raises(DataError, match=r"set.tar is not safe to unpack: .*outside.*nothing was written"):
        run(path, tmp_path / "in" / "dst")
    assert os.listdir(tmp_path) == ["in"]
    assert os.listdir(tmp_path / "in") == ["set.tar"]


def test_links_and_devices_are_refused(tmp_path: Path, run: Run) -> None:
    member = tarfile.TarInfo("cat/a.jpg")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(DataError, match="is not safe to unpack"):
        run(with_member(tmp_path / "a.tar", member), tmp_path / "dst")
    member.linkname = "b.jpg"
    with pytest.raises(DataError, match=r"holds cat/a.jpg as a link"):
        run(with_member(tmp_path / "b.tar", member), tmp_path / "dst")
    member.type = tarfile.CHRTYPE
    with pytest.raises(DataError, match="is not safe to unpack"):
        run(with_member(tmp_path / "c.tar", member), tmp_path / "dst")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_cut_short_is_refused_wherever_it_is_cut(
    tmp_path: Path, make_folder: Any, archive: Any, run: Run, mode: str
) -> None:
    """Guards against tarfile, which takes a missing header for the end and would give fewer images without a word."""
    path = archive(make_folder({"cat": 4}), tmp_path / "set.tar", mode)
    whole = path.read_bytes()
    # a plain tar: folder header, then blocks of a header and an image of one or two blocks
    for length in [512, 1024, 1536, 2048, 2560] if mode == "w" else [len(whole) // 2, len(whole) - 4]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"is cut short or damaged|is no whole tar|is damaged"):
            run(path, tmp_path / "dst")
        assert not (tmp_path / "dst").exists()
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_damaged_header_in_the_middle_is_refused(tmp_path: Path, make_folder: Any, archive: Any, run: Run) -> None:
    path = archive(make_folder({"cat": 4}), tmp_path / "set.tar", "w")
    with tarfile.open(path) as tar:
        at = tar.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="cut short or damaged after 2 members"):
        run(path, tmp_path / "dst")


@pytest.mark.parametrize("extended", [False, True])
def test_a_member_of_a_negative_size_is_refused_and_no_endless_loop(
    tmp_path: Path, make_folder: Any, archive: Any, run: Run, extended: bool
) -> None:
    """tarfile goes back by that size and reads the same members for ever (CVE-2025-8194)."""
    path = archive(make_folder({"cat": 4}), tmp_path / "set.tar", "w")
    with tarfile.open(path) as tar:
        member = tar.getmembers()[2]
        at = member.offset if extended else member.offset_data - 512  # of the pax header before it, or its own
        assert extended == (at + 512 < member.offset_data)
    header = bytearray(path.read_bytes())
    back = member.offset_data - member.offset  # to where the member begins
    header[at + 124 : at + 136] = (2**96 - back).to_bytes(12, "big")  # -back in the base-256 form
    header[at + 148 : at + 156] = b" " * 8
    header[at + 148 : at + 156] = b"%06o\0 " % sum(header[at : at + 512])
    path.write_bytes(header)
    with pytest.raises(DataError, match="is cut short or damaged after|is no whole tar"):
        run(path, tmp_path / "dst")


def test_what_is_no_tar_is_refused(tmp_path: Path, run: Run) -> None:
    (tmp_path / "set.bin").write_bytes(b"BM" + bytes(2000))
    with pytest.raises(DataError, match=r"no whole tar archive .*; name a folder, a .tar, .* or .zip of one, ImageNet's"):
        run(tmp_path / "set.bin", tmp_path / "dst")


@pytest.mark.parametrize("kind, size", [(tarfile.REGTYPE, 2**80), (tarfile.GNUTYPE_LONGNAME, 2**80), (tarfile.XHDTYPE, 2**55)])
def test_a_size_beyond_what_a_file_can_have_is_refused(tmp_path: Path, run: Run, kind: bytes, size: int) -> None:
    """Found by fuzzing: tarfile seeks to the member's end, or reads it all, before it looks whether there is so much."""
    member = tarfile.TarInfo("cat/a.jpg")
    member.type, member.size = kind, size
    (tmp_path / "set.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match=r"set.tar is no whole tar archive"):
        run(tmp_path / "set.tar", tmp_path / "dst")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("place", [0.3, 0.5, 0.8])
def test_damage_to_a_compressed_archive_is_refused_by_name(
    tmp_path: Path, make_folder: Any, archive: Any, run: Run, mode: str, place: float
) -> None:
    """Found by fuzzing: bz2's errors are plain OSErrors, which name no file."""
    path = archive(make_folder({"cat": 4}), tmp_path / "set.tar", mode)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"set.tar is damaged"):
        run(path, tmp_path / "dst")
