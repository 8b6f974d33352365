"""Sets that mean harm under fitting digests: an error that names what is wrong, without a hang, in bounded memory and disk."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clae_dist.data.fetch import Patience, fetch
from clae_dist.data.manifest import content_digest, load_manifest
from clae_dist.data.room import Room
from clae_dist.data.shards import ShardReader
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.data.tar_index import begins_as_tar
from clae_dist.errors import DataError
from clae_dist.files import file_sha256
from data_prep.sources import tar as tars
from data_prep.sources.entry import UnreadableError
from data_prep.sources.zip import zip_members


def sign(folder: Path, change: Callable[[dict[str, Any]], object] = lambda content: None) -> None:
    """Makes the digests right again, after `change` of the manifest's content."""
    content = json.loads((folder / "manifest.json").read_text())
    for shard in content["splits"]["train"]:
        shard["index_sha256"] = file_sha256(folder / shard["name"].replace(".tar", ".index.npy"))
    change(content)
    content["digest"] = content_digest(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def change_row(folder: Path, column: int, value: int) -> None:
    path = folder / "train-000000.index.npy"
    index = np.load(path)
    index[3, column] = value
    np.save(path, index)
    sign(folder)


def list_thrice(folder: Path) -> None:
    sign(folder, lambda content: content["splits"].update(train=content["splits"]["train"] * 3))


def list_in_both(folder: Path) -> None:
    sign(folder, lambda content: content["splits"].update(test=content["splits"]["train"]))


def lie_in_the_header(folder: Path) -> None:
    """An index of 24 bytes a row that says that it has 10^13 rows."""
    path = folder / "train-000000.index.npy"
    path.write_bytes(path.read_bytes().replace(b"(20, 3), ", b"(9999999999999, 3), ").replace(b"          \n", b"\n"))
    sign(folder)


def make_fifo(folder: Path) -> None:
    (folder / "train-000000.tar").unlink()
    os.mkfifo(folder / "train-000000.tar")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: change_row(folder, 2, 10**12), "has the label 1000000000000 in row 3, but there are 2 classes"),
        (lambda folder: change_row(folder, 0, 10**15), "points outside of its shard of .* bytes in 1 rows, first in row 3"),
        (lambda folder: change_row(folder, 0, -512), "points outside of its shard"),
        (lambda folder: change_row(folder, 1, 2**62), "points outside of its shard"),
        (list_thrice, "the shard train-000000.tar is listed 3 times"),
        (list_in_both, "the shard train-000000.tar is listed 2 times"),
        (lie_in_the_header, "cannot be read"),
        (make_fifo, "it is not a plain file"),
    ],
)
def test_a_signed_set_that_lies_is_refused_where_it_is_read(tmp_path: Path, harm: Callable[[Path], None], reason: str) -> None:
    folder = write_synthetic_set(tmp_path / "set", 20, 16).folder
    harm(folder)
    with pytest.raises(DataError, match=reason):
        ShardReader(load_manifest(folder), "train").read(0, 3)


def bomb(compress: Callable[[bytes], bytes], size: int = 40 << 20) -> bytes:
    """A compressed tar of one image of zeros."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        member = tarfile.TarInfo("cat/1.png")
        member.size = size
        tar.addfile(member, io.BytesIO(bytes(size)))
    return compress(stream.getvalue())


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_a_compressed_bomb_is_stopped_by_its_growth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(tars, "_SMALL_BYTES", 4 << 20)
    (tmp_path / "bomb.tar.gz").write_bytes(bomb(compress))
    with pytest.raises(DataError, match="bomb.tar.gz grows to more than 100 times its size"):
        tars.plain_tar(tmp_path / "bomb.tar.gz", tmp_path / "plain.tar", lambda count: None)
    assert (tmp_path / "plain.tar").stat().st_size < 8 << 20


def test_a_disk_is_not_filled_to_its_last_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.tar.gz").write_bytes(bomb(gzip.compress))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tars.shutil, "disk_usage", lambda path: usage._replace(total=10 << 30, free=100 << 20))
    with pytest.raises(OSError, match="plain.tar cannot be written: No space left on device"):
        tars.plain_tar(tmp_path / "large.tar.gz", tmp_path / "plain.tar", lambda count: None)


def test_a_member_of_a_zip_that_grows_without_measure_is_set_aside(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/1.png", bytes(40 << 20))
    ((_, entry),) = zip_members(tmp_path / "set.zip")
    assert entry is not None
    opened = entry.opener(entry.file)
    with pytest.raises(UnreadableError, match="would grow to 41943040, as those of no image do"):
        opened.read(entry)
    opened.close()


def test_a_stream_that_begins_as_no_tar_is_not_fetched_to_its_end(tmp_path: Path) -> None:
    """`pipe:gzip -dc bomb.gz` wrote as long as there was room."""
    with (tmp_path / "part").open("w+b") as part, pytest.raises(DataError, match="it begins with zeros and contains no file"):
        fetch("pipe:cat /dev/zero", part, "bomb.tar", Patience(0, 10.0), lambda file: "", begins=begins_as_tar)
    assert (tmp_path / "part").stat().st_size < 4 << 20
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert begins_as_tar(stream.getvalue()[:512]) == ""
    assert "no header of a file" in begins_as_tar(b"<html>" * 100)


def test_a_part_of_unknown_size_leaves_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=100 << 30, free=1200 << 20))
    room, part = Room(tmp_path, 0), tmp_path / "x.part"
    part.touch()
    room.grow(part, 100 << 20)
    with pytest.raises(DataError, match="too little for a shard of unknown size"):
        room.grow(part, 300 << 20)
