"""Where the images of a WebDataset shard lie, from the headers of the tar alone: 0.01 ms a file, no image is read.

WebDataset's conventions: files with the same path up to the first dot of the base name are one sample, one after the other;
what follows that dot says what a file is: `jpg`, `png`, … the image, `cls` (a number or a name) or `json` its label.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple

import numpy as np

from clae_dist.data.manifest import DataError

IMAGES = frozenset("jpg jpeg jpe jfif png webp gif bmp tif tiff ppm pgm pbm pnm avif jp2 img".split())
_MOST_CLASSES = 1_000_000  # a larger number is an id
_LONGEST_NAME = 200  # characters of a class; more is a caption
_LABEL_KEYS = ("label", "cls", "class_id", "class_index", "class")
_BLOCK = 512
_END = bytes(_BLOCK)
_MAX_TEXT_BYTES = 1 << 20


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarIndex:
    """What a shard holds. `rows` is int64 (samples, 3): offset of the image's bytes, their number, the label (-1: none)."""

    rows: np.ndarray
    keys: tuple[str, ...]  # of the samples
    without_image: int  # samples that hold no image and are left out
    names: tuple[str, ...] = ()  # where KEY.cls is a text: the labels are positions here
    odd_labels: int = 0  # neither whole numbers from 0 on nor names; -1 in `rows`


def index_tar(file: IO[bytes], name: str) -> TarIndex:
    """The samples of an open tar, in its order; `name` is what errors call it.

    Raises DataError for what is no whole, uncompressed tar, and for one without images.
    """
    if not file.seek(0, 2):
        raise DataError(f"{name} is empty; fetch or write it again.")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        places, labels, keys, without_image = [], [], [], 0
        for key, files in _samples(members(content, name)):
            image = next((files[kind] for kind in files if kind.lower() in IMAGES), None)
            if image is None:
                without_image += 1
                continue
            places.append((image.offset, image.size))
            labels.append(_label(content, files))
            keys.append(key)
    if not places:
        raise DataError(f"{name} holds no images (files such as KEY.jpg or KEY.png); name shards of images.")
    numbers, names = _numbered(labels)
    rows = np.array([(*place, label) for place, label in zip(places, numbers, strict=True)], np.int64)
    return TarIndex(rows, tuple(keys), without_image, names, labels.count(None))


def files_of(content: mmap.mmap, name: str, offset: int, after: int) -> dict[str, Member]:
    """The files of the sample whose image's bytes begin at `offset`, by kind (`jpg`, `json`, …).

    `after` is the end of an earlier file's bytes, such as the image before, or 0. Raises DataError where a tar is damaged.
    """
    start = -(-after // _BLOCK) * _BLOCK
    found = (files for _, files in _samples(members(content, name, start)) if any(f.offset == offset for f in files.values()))
    return next(found, {})


def _samples(found: Iterator[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, files by kind) of every sample."""
    key, files = "", dict[str, Member]()
    for member in found:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, kind = base.partition(".")
        if not stem or not dot or (not folder and base.startswith("__") and base.endswith("__")):
            continue  # of no sample, as WebDataset sees it
        if folder + slash + stem != key or kind in files:
            if files:
                yield key, files
            key, files = folder + slash + stem, {}
        files[kind] = member
    if files:
        yield key, files


def _label(content: mmap.mmap, files: dict[str, Member]) -> int | str | None:
    """From KEY.cls a number or a text, else the number in KEY.json, else -1. None for what is in KEY.cls and can be neither."""
    member = files.get("cls") or files.get("json")
    if member is None:
        return -1
    if member.size > _MAX_TEXT_BYTES:
        return None if "cls" in files else -1
    data = content[member.offset : member.offset + member.size]
    if "cls" in files:
        return _number_or_name(data.decode("utf-8", "replace").strip())
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):  # JSON of another kind than labels; it is not ours to judge
        return -1
    found = next((record[key] for key in _LABEL_KEYS if isinstance(record, dict) and type(record.get(key)) is int), -1)
    return found if -1 <= found < _MOST_CLASSES else None


def _number_or_name(text: str) -> int | str | None:
    try:
        number = int(text)
    except ValueError:
        return text if 0 < len(text) <= _LONGEST_NAME and text.isprintable() else None
    return number if -1 <= number < _MOST_CLASSES else None


def _numbered(labels: list[int | str | None]) -> tuple[list[int], tuple[str, ...]]:
    """The labels as numbers, and their names if one of them is a name: then the numbers among them are names, too."""
    if not any(isinstance(label, str) for label in labels):
        return [label if isinstance(label, int) else -1 for label in labels], ()
    named = [None if label in (None, -1) else str(label) for label in labels]
    names = tuple(sorted({name for name in named if name is not None}))
    places = {name: place for place, name in enumerate(names)}
    return [-1 if name is None else places[name] for name in named], names


def members(content: mmap.mmap | bytes, name: str, start: int = 0) -> Iterator[Member]:
    """The files of a tar (ustar, pax, GNU), from the one whose header is at `start` on.

    Raises DataError, naming the place, for one that is damaged or cut short.
    """
    position, override = start, dict[str, str]()
    while True:
        header = content[position : position + _BLOCK]
        if len(header) < _BLOCK:
            raise DataError(
                f"{name} ends at byte {len(content)} without the end mark of a tar: it was cut short; fetch it again."
            )
        if header == _END:
            break
        size, kind = _checked(header, position, name), header[156:157]
        start = position + _BLOCK
        if kind in b"xL":  # an extended header for the next file, before its own
            if start + size > len(content) or size > _MAX_TEXT_BYTES:
                raise _damaged(name, position, f"an extended header of {size} bytes does not fit")
            data = content[start : start + size]
            override |= _pax(data, name, position) if kind == b"x" else {"path": _text(data)}
            position = start + -(-size // _BLOCK) * _BLOCK
            continue
        if kind == b"S" or any(key.startswith("GNU.sparse") for key in override):
            raise DataError(f"{name} holds a sparse file at byte {position}; write the shard without them (tar without -S).")
        if kind in b"123456":
            size = 0  # links and folders have no bytes, whatever their header says
        elif override and "size" in override:
            size = _pax_size(override["size"], name, position)
        if start + size > len(content):
            raise _damaged(name, position, f"a file of {size} bytes does not fit into the rest: it was cut short")
        if kind in b"0\x007":
            yield Member(override.get("path") or _path(header), start, size)
        if override and kind not in b"gK":  # headers of all files, and of a long link: the next file's own is still to come
            override = {}
        position = start + -(-size // _BLOCK) * _BLOCK
    if _anything_after(content, position):
        raise _damaged(name, position, "more follows behind the end mark: several tars in one file, or damage")


def _checked(header: bytes, position: int, name: str) -> int:
    """The size that a header gives. Raises DataError when the header's checksum is not that of its bytes."""
    try:
        wanted = int(header[148:156].strip(b" \0") or b"-1", 8)  # of all bytes, these eight counted as spaces
        size = int.from_bytes(header[125:136]) if header[124] == 0x80 else int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        raise _damaged(name, position, "no header of a file is there") from None
    if sum(header) - sum(header[148:156]) + 8 * 32 != wanted or size < 0:
        raise _damaged(name, position, "no header of a file is there")
    return size


def _damaged(name: str, position: int, why: str) -> DataError:
    return DataError(f"{name} is no whole, uncompressed tar: at byte {position} {why}; fetch or write it again.")


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _path(header: bytes) -> str:
    path, prefix = _text(header[:100]), _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{path}" if prefix else path


def _pax(data: bytes, name: str, position: int) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header."""
    records, at = {}, 0
    while at < len(data):
        length, _, _ = data[at : at + 20].partition(b" ")
        end = at + int(length) if length.isdigit() else 0
        key, equals, value = data[at + len(length) + 1 : end - 1].partition(b"=")
        if not at < end <= len(data) or not equals or data[end - 1 : end] != b"\n":
            raise _damaged(name, position, "its extended header cannot be read")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at = end
    return records


def _pax_size(text: str, name: str, position: int) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise _damaged(name, position, f"its extended header gives the size {text[:20]!r}")
    return int(text)


def _anything_after(content: mmap.mmap | bytes, position: int) -> bool:
    """Whether anything but zeros follows: WebDataset and tar would leave it out without a word."""
    for start in range(position, len(content), 1 << 20):
        part = content[start : start + (1 << 20)]
        if part.count(0) != len(part):
            return True
    return False
