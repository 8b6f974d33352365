"""One shard: read its images, check each, write the good ones with WebDataset's writer, read the offsets back."""

from __future__ import annotations

import io
import mmap
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from clae_dist.data.decode import DecodeError
from clae_dist.data.manifest import Shard
from clae_dist.files import file_sha256, write_atomically
from clae_dist.storage import writing
from data_prep.image import MAX_ENCODED_BYTES, checked
from data_prep.plan import ShardPlan
from data_prep.settings import PrepareSettings
from data_prep.sources.entry import Entry, OpenFile, UnreadableError

REPORT_EVERY_S = 0.25


@dataclass(frozen=True)
class ShardTask:
    """A shard to be written to `tar` and `index`, which are temporary names: only the parent gives them their own."""

    plan: ShardPlan
    tar: Path
    index: Path
    settings: PrepareSettings


@dataclass(frozen=True)
class ShardResult:
    """`shard` is None when no image of it was good. `bad` holds (path, reason)."""

    plan_name: str
    shard: Shard | None
    bad: tuple[tuple[str, str], ...]
    tar: Path
    index: Path


def write_shard(task: ShardTask, report: Callable[[int], None]) -> ShardResult:
    """Writes one shard and calls `report` with the number of images done since the last call.

    The same images give the same bytes: times, owners and modes are fixed. Raises DataError for a source that is damaged or
    changes, StorageError when the shard cannot be written, OSError when an image cannot be read.
    """
    place = task.tar.parent / task.plan.name
    with writing(place):
        stream = task.tar.open("wb")
    with stream:
        written, bad = _write_tar(task, stream, place, report)
        with writing(place):
            stream.flush()
            os.fsync(stream.fileno())
    if not written:
        return ShardResult(task.plan.name, None, tuple(bad), task.tar, task.index)
    _read_back(task.tar, written)
    write_index(task.index, np.array([(one.offset, one.size, one.label) for one in written], np.int64))
    size, sha256, index_sha256 = task.tar.stat().st_size, file_sha256(task.tar), file_sha256(task.index)
    shard = Shard(task.plan.name, len(written), size, sha256, index_sha256)
    return ShardResult(task.plan.name, shard, tuple(bad), task.tar, task.index)


@dataclass(frozen=True)
class _Written:
    """A row of the index, and what the bytes must be when they are read back."""

    offset: int
    size: int
    label: int
    crc: int


def _write_tar(
    task: ShardTask, stream: IO[bytes], place: Path, report: Callable[[int], None]
) -> tuple[list[_Written], list[tuple[str, str]]]:
    """The rows of the index and the bad images' (path, reason), in the order of the plan. `place` is what errors name."""
    written: list[_Written] = []
    bad: list[tuple[str, str]] = []
    done, last = 0, time.monotonic()
    with _tar_writer(stream, place) as writer, _Reader() as reader:
        for sample in task.plan.samples:
            try:
                data, extension = checked(reader.read(sample.entry), task.settings)
            except (UnreadableError, DecodeError) as error:
                bad.append((sample.entry.path, str(error)))
            else:
                # Label and image in two calls, which write the same as one does, so that the image's bytes come last.
                with writing(place):
                    writer.write({"__key__": sample.key, "cls": str(sample.label).encode()})
                    writer.write({"__key__": sample.key, extension: data})
                offset = writer.tarstream.offset - -(-len(data) // 512) * 512
                written.append(_Written(offset, len(data), sample.label, zlib.crc32(data)))
                writer.tarstream.members.clear()  # tarfile keeps them all; nobody asks for them here
            done += 1
            if time.monotonic() - last > REPORT_EVERY_S:
                report(done)
                done, last = 0, time.monotonic()
    report(done)
    return written, bad


@contextmanager
def _tar_writer(stream: IO[bytes], place: Path) -> Iterator[Any]:
    """WebDataset's writer, closed at the end."""
    from webdataset.writer import TarWriter

    # mtime is an int: a float would add a pax header with its fraction to every member.
    writer = TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False)
    try:
        yield writer
        with writing(place):
            writer.close()
    except BaseException:
        writer.tarstream.fileobj.closed = True  # or tarfile would complain, when it is collected, that it cannot write the rest
        raise


def write_index(path: Path, rows: np.ndarray) -> None:
    """Writes an index, as a whole or not at all. Raises StorageError."""
    data = io.BytesIO()
    np.save(data, rows)  # to the disk itself, numpy's errors name no reason
    write_atomically(path, data.getvalue())


class _Reader:
    """Reads images one after the other and keeps the file open while it stays the same (an archive)."""

    def __init__(self) -> None:
        self._key: tuple[str, type[OpenFile]] | None = None
        self._file: OpenFile | None = None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, entry: Entry) -> bytes:
        """The encoded bytes. Raises UnreadableError for what is wrong with this image, DataError with the source."""
        if entry.size > MAX_ENCODED_BYTES:
            raise UnreadableError(f"{entry.size} bytes, above the limit of {MAX_ENCODED_BYTES} for one image")
        key = (entry.file, entry.opener)
        if self._file is None or key != self._key:
            self._close()
            self._file, self._key = entry.opener(entry.file), key
        return self._file.read(entry)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _read_back(tar: Path, written: list[_Written]) -> None:
    """Asserts that every row of the index points behind a header of a file of that size, at the image's very bytes."""
    with tar.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for row in written:
            header = content[row.offset - 512 : row.offset]
            assert header[257:262] == b"ustar", f"{tar}: no file starts at {row.offset}"
            assert int(header[124:135], 8) == row.size, f"{tar}: no file starts at {row.offset}"
            assert zlib.crc32(content[row.offset : row.offset + row.size]) == row.crc, f"{tar}: other bytes at {row.offset}"
