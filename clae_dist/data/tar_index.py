"""Index the images of a WebDataset shard from the headers of the tar alone: 0.01 ms per file, no image is read.

WebDataset's conventions: consecutive files with the same path up to the first dot of the base name are one sample. The rest of
the name, in either case, is the kind of the file: `jpg`, `png`, … the image, `cls` (a number or a name) or `json` its label.
Files of one sample that are not consecutive are an error: WebDataset would make several samples of them. If no image of a
shard has a plain kind, `KEY.rgb.jpg` is one, with `KEY.rgb.cls` or `KEY.cls` as its label.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, NamedTuple

import numpy as np

from clae_dist.data.labels import NONE, OddLabelError, label_in_json, label_in_text
from clae_dist.errors import DataError

IMAGES = frozenset("jpg jpeg jpe jfif png webp gif bmp tif tiff ppm pgm pbm pnm avif jp2 img".split())
NO_IMAGE = "samples without an image, skipped"
NO_SAMPLE = "files of no sample, skipped"
SECOND_IMAGES = "second images of a sample, skipped"
ODD_LABELS = "labels that are neither names nor non-negative integers, ignored"
_BLOCK = 512
_END = bytes(_BLOCK)
_MAX_TEXT_BYTES = 1 << 20


class Member(NamedTuple):
    """A file in a tar: its name and the position of its bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Dropped:
    """Unused parts of shards: the count and one example for each reason."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count a reason; the first `example` is kept."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.examples.setdefault(reason, example)

    def include(self, other: Dropped) -> None:
        """Add the counts of another shard."""
        for reason, count in other.counts.items():
            self.add(reason, other.examples[reason], count)

    def lines(self) -> list[str]:
        """One line per reason, with names escaped."""
        return [f"{reason}: {count:,}, such as {self.examples[reason]!r}" for reason, count in self.counts.items()]


@dataclass(frozen=True)
class TarIndex:
    """The content of a shard. `rows` is int64 (samples, 3): offset and number of the image's bytes, label (-1: none)."""

    rows: np.ndarray
    keys: tuple[str, ...]  # of the samples
    dropped: Dropped
    names: tuple[str, ...] = ()  # where a label is a text: the labels are positions here

    @property
    def label_names(self) -> dict[int, str]:
        """The name of each label in `rows`: its text, else its number."""
        labels = np.unique(self.rows[:, 2]).tolist()
        return {label: self.names[label] if self.names else str(label) for label in labels if label >= 0}


def index_tar(file: IO[bytes], name: str) -> TarIndex:
    """The samples of an open tar, in its order; `name` is used in errors.

    Raises DataError for anything but a complete uncompressed tar, for one without images, and for a sample whose files are not
    consecutive.
    """
    if not file.seek(0, 2):
        raise DataError(f"{name} is empty; fetch or write it again.")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = _index(content, name, _plain_image)
        found = found or _index(content, name, lambda files: _named_image(files, name))
    if not found:
        raise DataError(f"{name} holds no images (files such as KEY.jpg or KEY.png); name shards of images.")
    return found


def _index(content: mmap.mmap, name: str, image_of: Callable[[TarSample], tuple[str, Member] | None]) -> TarIndex | None:
    """None if `image_of` finds no image in any sample."""
    dropped = Dropped()
    places: list[tuple[int, int]] = []
    labels: list[int | str] = []
    keys: list[str] = []
    for sample in samples_of(members(content, name), name, dropped):
        found = image_of(sample)
        if found is None:
            dropped.add(NO_IMAGE, f"{sample.key}.{next(iter(sample.files))}")
            continue
        kind, image = found
        images = [other for other in sample.files if other in IMAGES]
        if len(images) > 1:
            dropped.add(SECOND_IMAGES, f"{sample.key}.{images[1]}", len(images) - 1)
        places.append((image.offset, image.size))
        labels.append(_label(content, sample, kind.rpartition(".")[0], dropped))
        keys.append(sample.key)
    if not places:
        return None
    numbers, names = _numbered(labels)
    rows = np.array([(*place, label) for place, label in zip(places, numbers, strict=True)], np.int64)
    return TarIndex(rows, tuple(keys), dropped, names)


def _plain_image(sample: TarSample) -> tuple[str, Member] | None:
    return next(((kind, file) for kind, file in sample.files.items() if kind in IMAGES), None)


def _named_image(sample: TarSample, name: str) -> tuple[str, Member] | None:
    """The one image whose kind has dots, such as rgb.jpg. Raises DataError for a sample with several."""
    images = [(kind, file) for kind, file in sample.files.items() if kind.rpartition(".")[2] in IMAGES]
    if len(images) > 1:
        raise DataError(
            f"{name} holds {len(images)} images in the sample {sample.key!r}: "
            f"{', '.join(repr(kind) for kind, _ in images[:3])}. A key ends at the first dot of a file's name; write the shard "
            "with keys without dots."
        )
    return images[0] if images else None


def begins_as_tar(start: bytes) -> str:
    """The reason why the first bytes of a stream (512 at least) are not those of a tar; "" if they are."""
    if start[:_BLOCK] == _END:
        return "it begins with zeros and contains no file"
    try:
        _checked(start[:_BLOCK], 0, "the stream")
    except DataError as error:
        return str(error).split("; ")[0]
    return ""


def files_of(content: mmap.mmap, name: str, offset: int, after: int) -> dict[str, Member]:
    """The files of the sample whose image's bytes begin at `offset`, by kind (`jpg`, `json`, …).

    `after` is the end of an earlier file's bytes, such as the image before, or 0. Raises DataError where a tar is damaged.
    """
    start = -(-after // _BLOCK) * _BLOCK
    found = samples_of(members(content, name, start), name, Dropped())
    return next((sample.files for sample in found if any(file.offset == offset for file in sample.files.values())), {})


@dataclass(frozen=True)
class TarSample:
    """Consecutive files of a tar with one key."""

    key: str
    files: dict[str, Member]  # by kind, in small letters


def samples_of(found: Iterator[Member], name: str, dropped: Dropped) -> Iterator[TarSample]:
    """Yield every sample. Raises DataError for a key that is repeated later."""
    sample, seen = TarSample("", {}), set[str]()
    for member in found:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, kind = base.partition(".")
        if not stem or not dot or (not folder and base.startswith("__") and base.endswith("__")):
            dropped.add(NO_SAMPLE, member.name)  # as in WebDataset
            continue
        key, kind = folder + slash + stem, kind.lower()
        if key != sample.key or not sample.files:
            if sample.files:
                yield sample
            if key in seen:
                raise _apart(name, member.name, key)
            seen.add(key)
            sample = TarSample(key, {})
        elif kind in sample.files:
            raise _apart(name, member.name, key)
        sample.files[kind] = member
    if sample.files:
        yield sample


def _apart(name: str, file: str, key: str) -> DataError:
    return DataError(
        f"{name} holds the sample {key!r} again with {file!r}: its files do not follow one another, or two samples have one "
        "key. Write the shard again, the files of a sample side by side (tar --sort=name), and every key once."
    )


def _label(content: mmap.mmap, sample: TarSample, prefix: str, dropped: Dropped) -> int | str:
    """The label from KEY.cls or KEY.json; `prefix` precedes the image's kind. -1 without a valid label."""
    kinds = [f"{before}.{kind}".lstrip(".") for kind in ("cls", "json") for before in dict.fromkeys((prefix, ""))]
    kind = next((kind for kind in kinds if kind in sample.files), "")
    if not kind:
        return NONE
    member = sample.files[kind]
    try:
        if member.size > _MAX_TEXT_BYTES:
            raise OddLabelError(f"{member.size:,} bytes")
        data = content[member.offset : member.offset + member.size]
        return label_in_json(data) if kind.endswith("json") else label_in_text(data)
    except OddLabelError as error:
        dropped.add(ODD_LABELS, f"{sample.key}.{kind} ({error})")
        return NONE


def _numbered(labels: list[int | str]) -> tuple[list[int], tuple[str, ...]]:
    """The labels as numbers, and their names if one of them is a name: then the numbers among them are names, too."""
    if not any(isinstance(label, str) for label in labels):
        return [label for label in labels if isinstance(label, int)], ()
    named = [None if label == NONE else str(label) for label in labels]
    names = tuple(sorted({name for name in named if name is not None}))
    places = {name: place for place, name in enumerate(names)}
    return [NONE if name is None else places[name] for name in named], names


def members(content: mmap.mmap | bytes, name: str, start: int = 0) -> Iterator[Member]:
    """Yield the files of a tar (ustar, pax, GNU), beginning with the header at `start`.

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
            size = 0  # links and folders have no content, also if their header has a size
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
        raise _damaged(name, position, "the end mark is followed by more data: several tars in one file, or damage")


def _checked(header: bytes, position: int, name: str) -> int:
    """The size that a header declares. Raises DataError if its checksum is wrong."""
    try:
        expected = int(header[148:156].strip(b" \0") or b"-1", 8)  # the sum of all bytes, with these eight as spaces
        size = int.from_bytes(header[125:136]) if header[124] == 0x80 else int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        raise _damaged(name, position, "is no header of a file") from None
    if sum(header) - sum(header[148:156]) + 8 * 32 != expected or size < 0:
        raise _damaged(name, position, "is no header of a file")
    return size


def _damaged(name: str, position: int, why: str) -> DataError:
    return DataError(f"{name} is not a complete, uncompressed tar: at byte {position} {why}; fetch or write it again.")


def stored_name(content: mmap.mmap | memoryview, offset: int) -> str:
    """The name in the header before the bytes of a file, for messages and lists; "" where there is no header."""
    header = bytes(content[max(0, offset - _BLOCK) : offset])
    if begins_as_tar(header):
        return ""
    return _path(header).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


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
    """True if anything but zeros follows, which WebDataset and tar would ignore silently."""
    for start in range(position, len(content), 1 << 20):
        part = content[start : start + (1 << 20)]
        if part.count(0) != len(part):
            return True
    return False
