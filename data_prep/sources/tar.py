"""List the members of a tar with sizes and offsets, for plain tars, compressed ones and tars inside tars."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

from clae_dist.data.image_names import is_image_name
from clae_dist.errors import DataError
from clae_dist.storage import writing
from data_prep.sources.entry import Entry, Report

_COMPRESSIONS: tuple[tuple[bytes, Callable[[IO[bytes]], IO[bytes]]], ...] = (  # how the files start, what opens them
    (b"\x1f\x8b", cast("Callable[[IO[bytes]], IO[bytes]]", gzip.open)),
    (b"BZh", cast("Callable[[IO[bytes]], IO[bytes]]", bz2.open)),
    (b"\xfd7zXZ\0", cast("Callable[[IO[bytes]], IO[bytes]]", lzma.open)),
)
_SMALL_BYTES = 256 << 20
_MOST_GROWTH = 100  # times; formats of images are compressed already, and bitmaps shrink to a tenth
_KEPT_FREE_BYTES = 1 << 30
_KINDS = "name a folder, a .tar, .tar.gz, .tar.bz2, .tar.xz or .zip of one, ImageNet's or CIFAR's archives, or Parquet files"


def plain_tar(path: Path, target: Path, report: Report) -> Path:
    """`path` itself when it is a plain tar, else `target`, into which it is decompressed. Raises DataError."""
    with path.open("rb") as stream:
        start = stream.read(6)
    opener = next((opener for magic, opener in _COMPRESSIONS if start.startswith(magic)), None)
    if opener is None:
        return path
    with writing(target):
        plain = target.open("wb")
    try:
        with plain, path.open("rb") as stream, opener(stream) as compressed:
            done = 0
            while chunk := compressed.read(1 << 20):
                _check_growth(path, stream.tell(), plain.tell() + len(chunk), target)
                with writing(target):
                    plain.write(chunk)
                report(stream.tell() - done)
                done = stream.tell()
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's; gzip's and bz2's own have no number
            raise
        raise DataError(f"{path} is damaged ({error}); get the archive again.") from None
    return target


def _check_growth(path: Path, num_read: int, num_written: int, target: Path) -> None:
    """Raises DataError for what grows as no images do, StorageError before the disk of `target` is full to the last byte."""
    if num_written > _SMALL_BYTES and num_written > _MOST_GROWTH * num_read:
        raise DataError(
            f"{path} grows to more than {_MOST_GROWTH} times its size ({num_read:,} bytes became {num_written:,}), as no "
            "images do; unpack it yourself, if you trust it, and name the folder."
        )
    disk = shutil.disk_usage(target.parent)
    if disk.free < min(_KEPT_FREE_BYTES, disk.total // 20) + (1 << 20):
        with writing(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def first_member(path: Path) -> str:
    """The name of the first member; "" for what is no tar."""
    try:
        with tarfile.open(path, "r:*") as tar:
            member = tar.next()
            return member.name if member else ""
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, EOFError, OSError, zlib.error, lzma.LZMAError):
        return ""


def tar_members(archive: Path, plain: Path, report: Report) -> Iterator[tuple[str, Entry | None]]:
    """Path and entry of every file, path and None of every folder. Raises DataError for what is damaged or unsafe."""
    with plain.open("rb") as stream:
        for member in walk(archive, stream, report if plain == archive else lambda _: None):  # else it was read before
            path = _safe_path(member, archive)
            if member.isdir():
                yield path, None
            elif (not member.isreg() or member.issparse()) and is_image_name(path.rpartition("/")[2]):
                raise DataError(f"{archive} holds {path} as a link or a sparse file; unpack it and name the folder instead.")
            else:
                yield path, Entry(path, member.size, str(plain), member.offset_data)


def walk(archive: Path, stream: IO[bytes], report: Report, start: int = 0, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The members of the tar that lies in `stream` from `start` to `end`, with offsets from the stream's beginning.

    Raises DataError when it is no whole tar: tarfile itself takes a missing or damaged header for the end.
    """
    count, behind = 0, start
    stream.seek(start)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                count += 1
                before, behind = behind, member.offset_data + (-(-member.size // 512) * 512 if member.isreg() else 0)
                if behind <= before:  # a negative size: tarfile would read the same members forever
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                report(behind - before)
                yield member
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
    except DataError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:  # the latter for sizes that cannot be
        raise DataError(f"{archive} is no whole tar archive ({error}); {_KINDS}.") from None
    if not _is_end(stream, behind, end):
        raise DataError(f"{archive} is cut short or damaged after {count} members; get the archive again.")


def _is_end(stream: IO[bytes], behind: int, end: int | None) -> bool:
    """True if the last member is followed by a block of zeros and nothing else."""
    stream.seek(behind)
    left = 1 << 62 if end is None else end - behind
    first = chunk = stream.read(max(0, min(512, left)))
    while chunk and not any(chunk):
        left -= len(chunk)
        chunk = stream.read(min(1 << 20, left))
    return len(first) == 512 and not chunk


def _safe_path(member: tarfile.TarInfo, archive: Path) -> str:
    """The member's path inside the set. Raises DataError for what tarfile's "data" filter refuses."""
    name = member.name
    if (member.isreg() or member.isdir()) and not name.startswith("/") and ".." not in name:
        return name  # nothing for the filter to object to; it costs 0.07 ms
    try:
        return tarfile.data_filter(member, os.path.abspath("images")).name
    except tarfile.FilterError as error:
        raise DataError(
            f"{archive} is not safe to unpack: {error}; nothing was written. Get the archive from a source you trust."
        ) from None
