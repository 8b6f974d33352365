"""Where images come from: a folder, or tar archives of one. Both give the same listing of names and places of bytes.

An archive is not spread over the disk as small files: it is decompressed into one plain tar in a scratch folder, and the
images are read from it at their offsets. Members that would leave the folder are refused by tarfile's "data" filter.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Protocol, cast

from clae_dist.data.manifest import DataError

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
IMAGE_SUFFIXES = (*_JPEG, ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2")
_COMPRESSIONS: tuple[tuple[bytes, Callable[[Path], IO[bytes]]], ...] = (  # how the files start, what opens them
    (b"\x1f\x8b", cast("Callable[[Path], IO[bytes]]", gzip.open)),
    (b"BZh", cast("Callable[[Path], IO[bytes]]", bz2.open)),
    (b"\xfd7zXZ\0", cast("Callable[[Path], IO[bytes]]", lzma.open)),
)


@dataclass(frozen=True)
class Entry:
    """One file that is an image by its name."""

    path: str  # relative, with "/"
    size: int  # bytes
    file: str  # the file on disk that holds the bytes: the image itself or a tar
    offset: int = 0  # of the bytes in `file`


@dataclass(frozen=True)
class Listing:
    """What a source holds."""

    entries: tuple[Entry, ...]  # sorted by path
    folders: frozenset[str]  # relative paths of all folders, the empty ones too
    ignored: tuple[str, ...]  # files that are no images by their names


class Source(Protocol):
    """A folder or archives. `fingerprint` changes when the input does; `listing` may use an empty scratch folder."""

    paths: tuple[Path, ...]

    def fingerprint(self) -> str: ...

    def listing(self, scratch: Path, /) -> Listing: ...


def open_source(path: Path) -> Source:
    """A folder or a tar archive. Raises DataError."""
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        return ArchiveSource((path,))
    raise DataError(f"{path} does not exist; name a folder of class folders, or a tar archive of one.")


def is_hidden(name: str) -> bool:
    """Names that file managers leave behind (.DS_Store, ._a.jpg, __MACOSX) and that hold no images of the set."""
    return name.startswith(".") or name == "__MACOSX"


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)


class FolderSource:
    """A folder on disk; symbolic links are followed."""

    def __init__(self, path: Path) -> None:
        self.paths: tuple[Path, ...] = (path,)

    @cached_property
    def _listing(self) -> tuple[Listing, str]:
        entries, ignored, folders, digest = [], [], set(), hashlib.sha256()
        for relative, item in _walk(self.paths[0]):
            if item.is_dir():
                folders.add(relative)
            elif not _is_image_name(item.name):
                ignored.append(relative)
            elif not item.is_file():
                raise DataError(f"{item.path} is a broken link or no plain file; remove it or put the image there.")
            else:
                status = item.stat()
                entries.append(Entry(relative, status.st_size, item.path))
                digest.update(f"{relative}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        digest.update(json.dumps(sorted(folders)).encode())
        return Listing(
            tuple(sorted(entries, key=lambda entry: entry.path)), frozenset(folders), tuple(ignored)
        ), digest.hexdigest()

    def fingerprint(self) -> str:
        """Over the names, sizes and modification times of all images, not over their bytes."""
        return self._listing[1]

    def listing(self, _scratch: Path, /) -> Listing:
        return self._listing[0]


def _walk(root: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Everything below `root`, in order of name, with relative paths. Raises DataError for folders linked in circles."""
    seen: set[tuple[int, int]] = set()
    pending = [(str(root), "")]
    while pending:
        folder, prefix = pending.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            raise DataError(f"{folder} is reached twice through links; remove one of them.")
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as items:
            for item in sorted(items, key=lambda item: item.name):
                if item.is_dir() and is_hidden(item.name):
                    continue
                yield prefix + item.name, item
                if item.is_dir():
                    pending.append((item.path, prefix + item.name + "/"))


class ArchiveSource:
    """One tar archive, plain or compressed, or several that together make one folder."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self.paths = paths

    def fingerprint(self) -> str:
        """Over the archives' names, sizes and modification times, not over their bytes."""
        stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()

    def listing(self, scratch: Path, /) -> Listing:
        """Decompresses into `scratch`, which the entries then refer to. Raises DataError for damaged or unsafe archives."""
        entries: dict[str, Entry] = {}
        folders: set[str] = set()
        ignored: list[str] = []
        for number, path in enumerate(self.paths):
            plain = _decompressed(path, scratch / f"{number}.tar")
            found = _members(path, plain, folders, ignored)
            both = next((name for name in found if name in entries), None)
            if both is not None:
                raise DataError(
                    f"{both} is in {' and in '.join(str(path) for path in self.paths)}; archives of one set share no file."
                )
            entries.update(found)
        listing = Listing(tuple(entries[path] for path in sorted(entries)), frozenset(folders), tuple(ignored))
        return _without_leading_folder(listing)


def _decompressed(path: Path, target: Path) -> Path:
    """`path` itself when it is a plain tar, else `target`, holding the plain tar."""
    with path.open("rb") as stream:
        start = stream.read(6)
    opener = next((opener for magic, opener in _COMPRESSIONS if start.startswith(magic)), None)
    if opener is None:
        return path
    try:
        with opener(path) as compressed, target.open("wb") as plain:
            shutil.copyfileobj(compressed, plain, 1 << 20)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's; gzip's and bz2's own have no number
            raise
        raise DataError(f"{path} is damaged ({error}); get the archive again.") from None
    return target


def _members(archive: Path, plain: Path, folders: set[str], ignored: list[str]) -> dict[str, Entry]:
    """Images of one archive by path; adds to `folders` and `ignored`."""
    entries: dict[str, Entry] = {}
    end = 0
    try:
        with tarfile.open(plain, "r:") as tar:
            for member in tar:
                end = member.offset_data + (-(-member.size // 512) * 512 if member.isreg() else 0)
                path = _safe_path(member, archive)
                parts = PurePosixPath(path).parts
                if not parts or any(is_hidden(part) for part in parts[:-1]):
                    continue
                path = "/".join(parts)
                inside = parts if member.isdir() else parts[:-1]
                folders.update("/".join(inside[: depth + 1]) for depth in range(len(inside)))
                if member.isdir():
                    continue
                if not _is_image_name(parts[-1]):
                    ignored.append(path)
                elif not member.isreg() or member.issparse():
                    raise DataError(
                        f"{archive} holds {path} as a link or a sparse file; unpack it and name the folder instead."
                    )
                else:
                    entries[path] = Entry(path, member.size, str(plain), member.offset_data)
    except DataError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:  # the latter for sizes that cannot be
        raise DataError(
            f"{archive} is no whole tar archive ({error}); name a folder or a .tar, .tar.gz, .tar.bz2 or .tar.xz."
        ) from None
    with plain.open("rb") as stream:
        stream.seek(end)
        if stream.read(512) != bytes(512):  # tarfile takes a missing or damaged header for the end
            raise DataError(f"{archive} is cut short or damaged after {len(entries)} images; get the archive again.")
    return entries


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


def _without_leading_folder(listing: Listing) -> Listing:
    """Archives are often made of one folder that holds everything; it is not a class."""
    tops = {path.split("/")[0] for path in listing.folders}
    if len(tops) != 1 or tops == {"train"}:
        return listing
    prefix = tops.pop() + "/"
    if not listing.entries or any(entry.path.count("/") < 2 for entry in listing.entries):
        return listing
    entries = tuple(Entry(e.path.removeprefix(prefix), e.size, e.file, e.offset) for e in listing.entries)
    folders = frozenset(path.removeprefix(prefix) for path in listing.folders if path.startswith(prefix))
    return Listing(entries, folders, listing.ignored)
