"""List the members of a zip, and read one of them by its offset: stored or deflated, checked against its CRC."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from clae_dist.errors import DataError
from data_prep.sources.entry import Entry, UnreadableError

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # signature, …, then the lengths of the name and of the extra field
_SIGNATURE = b"PK\x03\x04"
_ENCRYPTED = 0x1  # general purpose bit 0
_SMALL_BYTES = 32 << 20
_MOST_GROWTH = 100  # times
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def is_zip(path: Path) -> bool:
    """By how the file starts: what it ends with may be cut off."""
    with path.open("rb") as stream:
        return stream.read(4) in (_SIGNATURE, b"PK\x05\x06", b"PK\x07\x08")  # a member, an empty archive, a split one


def zip_members(path: Path) -> Iterator[tuple[str, Entry | None]]:
    """Path and entry of every file, path and None of every folder. Raises DataError for what is damaged or unsafe."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{path} is no whole zip archive ({error}); get the archive again.") from None
    if any(member.header_offset < 0 for member in members):
        raise DataError(f"{path} is no whole zip archive (its directory points before its start); get the archive again.")
    seen: set[str] = set()
    for member in members:
        name = member.filename.replace("\\", "/")  # what some Windows programs write
        _refuse_unsafe(path, member, name)
        if name.endswith("/"):
            yield name, None
            continue
        if name in seen:
            raise DataError(f"{path} holds {name} twice; which one is meant? Unpack it and name the folder instead.")
        seen.add(name)
        details = (member.compress_size, member.compress_type, member.CRC)
        yield name, Entry(name, member.file_size, str(path), member.header_offset, ZipFile, details)


def _refuse_unsafe(path: Path, member: zipfile.ZipInfo, name: str) -> None:
    """Nothing is unpacked, so that nothing could be overwritten; but an archive that tries is not to be trusted."""
    if name.startswith("/") or ".." in name.split("/") or (name[1:2] == ":" and "/" in name[2:3]):
        raise DataError(
            f"{path} is not safe to unpack: {name!r} would lie outside of its folder; nothing was written. "
            "Get the archive from a source you trust."
        )
    mode = member.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DataError(f"{path} holds {name} as a link or a device; unpack it and name the folder instead.")
    if member.flag_bits & _ENCRYPTED:
        raise DataError(f"{path} is encrypted ({name} is); unpack it with its password and name the folder instead.")
    if member.compress_type not in _METHODS:
        raise DataError(
            f"{path} holds {name} compressed by method {member.compress_type}, neither stored nor deflated; unpack it and name "
            "the folder instead."
        )


class ZipFile:
    """Members of a zip by the offset of their local header; its directory is not read again."""

    def __init__(self, file: str, /) -> None:
        self._descriptor = os.open(file, os.O_RDONLY)

    def read(self, entry: Entry, /) -> bytes:
        """The member's bytes. Raises UnreadableError when they are not what the archive's directory says."""
        compressed_size, method, crc = entry.details
        if entry.size > _SMALL_BYTES and entry.size > _MOST_GROWTH * compressed_size:
            raise UnreadableError(f"{compressed_size} bytes would grow to {entry.size}, as those of no image do")
        header = os.pread(self._descriptor, _LOCAL_HEADER.size, entry.offset)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(_SIGNATURE):
            raise UnreadableError("damaged: the archive's directory points at no member")
        *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        limit = min(compressed_size, 2 * entry.size + 1024)  # deflating enlarges by a thousandth: more is no honest number
        data = os.pread(self._descriptor, limit, entry.offset + _LOCAL_HEADER.size + name_bytes + extra_bytes)
        if method == zipfile.ZIP_DEFLATED:
            data = _inflate(data, entry.size)
        if len(data) != entry.size or zlib.crc32(data) != crc:
            raise UnreadableError("damaged: not the bytes that the archive's directory promises (CRC)")
        return data

    def close(self) -> None:
        os.close(self._descriptor)


def _inflate(data: bytes, size: int) -> bytes:
    """At most `size` + 1 bytes, so that a member that lies about its size fills no memory."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise UnreadableError(f"damaged: {error}") from None
