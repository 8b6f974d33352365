"""Interface of sources: images as entries, access to their bytes, and the listing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clae_dist.errors import DataError

ORIGINAL_BYTES = "original encoded bytes"
Report = Callable[[int], None]


class UnreadableError(ValueError):
    """One image's bytes cannot be had, though its source can be read; the message is the reason."""


class OpenFile(Protocol):
    """A file of a source, open for reading images one after the other."""

    def __init__(self, file: str, /) -> None: ...

    def read(self, entry: Entry, /) -> bytes:
        """One image's encoded bytes. Raises UnreadableError for this image, DataError when the file is to blame."""
        ...

    def close(self) -> None: ...


class PlainFile:
    """The encoded bytes lie in the file as they are: an image by itself, or a member of a tar."""

    def __init__(self, file: str, /) -> None:
        self._descriptor = os.open(file, os.O_RDONLY)

    def read(self, entry: Entry, /) -> bytes:
        data = os.pread(self._descriptor, entry.size, entry.offset)
        grown = entry.offset == 0 and os.fstat(self._descriptor).st_size > entry.size  # offset 0: the file is the image
        if len(data) != entry.size or grown:
            raise changed(entry, f"{entry.size} bytes")
        return data

    def close(self) -> None:
        os.close(self._descriptor)


def changed(entry: Entry, held: str) -> DataError:
    """The error for a source that is not what it was when it was listed."""
    return DataError(f"{entry.path} no longer has {held}: the source changes. Wait for that, then start anew.")


@dataclass(frozen=True, slots=True)
class Entry:
    """One image. Entries are sent to the workers, which read the bytes by `opener(file).read(entry)`."""

    path: str  # relative, with "/"
    size: int  # encoded bytes; where that takes decoding (Parquet), an estimate
    file: str  # the file on disk that holds the bytes: the image itself, a tar, a zip, …
    offset: int = 0  # of the bytes in `file`, or what its opener takes for it, such as a row number
    opener: type[OpenFile] = PlainFile
    details: tuple[Any, ...] = ()  # what else the opener must know
    run: tuple[str, int] = ("", 0)  # entries of the first that are best read together, in order of the second


@dataclass(frozen=True)
class Listing:
    """Files by name: the folders say what is in them."""

    entries: tuple[Entry, ...]  # sorted by path
    folders: frozenset[str]  # relative paths of all folders, the empty ones too
    ignored: tuple[str, ...]  # files that are no images by their names
    skipped: tuple[str, ...] = ()  # hidden folders and a system's own, which were not looked into


@dataclass(frozen=True)
class Layout:
    """Which images belong to which split and class; a label is a position in `classes`."""

    classes: tuple[str, ...]
    images: dict[str, dict[str, list[tuple[str, Entry]]]]  # by split and class ("": unlabelled), with what to name them by
    given: bool  # the splits are the source's own: none is drawn
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """Where images come from.

    `fingerprint` changes when the input does. `listing` may use an empty scratch folder; where it takes long, it calls
    `report` with the bytes of the source's files read since the last call.
    """

    paths: tuple[Path, ...]
    name: str  # of the set, where the user gives none
    pixels: str  # how the bytes it gives relate to what was published, for the manifest

    def fingerprint(self) -> str: ...

    def listing(self, scratch: Path, report: Report, /) -> Listing | Layout: ...


def plain_name(paths: tuple[Path, ...]) -> str:
    """The first path's name without what makes it an archive; of several archives without -train."""
    name = paths[0].resolve().name
    for suffix in (".tar", ".tgz", ".zip", ".parquet"):
        name = name.split(suffix)[0] or name
    return name.removesuffix("-train") if len(paths) > 1 else name


def origin_of(source: Source) -> str:
    """The default for the manifest's origin: the names of the files."""
    return " and ".join(path.resolve().name for path in source.paths)


def stamp(paths: tuple[Path, ...], *more: str) -> str:
    """A fingerprint over files' names, sizes and modification times, not over their bytes."""
    stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return hashlib.sha256(json.dumps([*stamps, *more]).encode()).hexdigest()
