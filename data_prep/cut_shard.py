"""One shard without some of its images or labels: the bytes of all others are copied as they are, with all their files."""

from __future__ import annotations

import mmap
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from clae_dist.data.labels import NONE
from clae_dist.data.manifest import Manifest, Shard, check_shard
from clae_dist.data.tar_index import Dropped, TarSample, members, samples_of, stored_name
from clae_dist.errors import DataError
from clae_dist.files import file_sha256
from clae_dist.storage import writing
from data_prep.audit.scan import open_shard
from data_prep.write import REPORT_EVERY_S, ShardResult, write_index

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class CutTask:
    """A shard of `source` to be copied to `tar` and `index`, which are temporary names."""

    source: Manifest  # of this shard only
    shard: Shard
    tar: Path
    index: Path
    drop: Mapping[int, str] = field(default_factory=dict)  # reason by row
    unlabel: frozenset[int] = frozenset()  # rows


def cut_shard(task: CutTask, report: Callable[[int], None]) -> ShardResult:
    """Write the shard and its index; calls `report` with the number of samples since the last call.

    Raises DataError for a shard that is not as its manifest says, StorageError when the new one cannot be written.
    """
    check_shard(task.source.folder, task.shard)
    rows, name = task.source.index(task.shard), task.shard.name
    place = task.tar.parent / name
    dropped, unlabelled = ({int(rows[row, 0]) for row in chosen} for chosen in (task.drop, task.unlabel))
    with open_shard(task.source.folder, task.shard) as content:
        bad = [(f"{name}/{stored_name(content, int(rows[row, 0]))}", reason) for row, reason in sorted(task.drop.items())]
        with writing(place), task.tar.open("wb") as stream:
            copy = _Copy(content, stream)
            for sample in _reported(samples_of(members(content, name), name, Dropped()), report):
                offsets = {file.offset for file in sample.files.values()}
                if offsets & dropped:
                    copy.skip(sample)
                else:
                    copy.write(sample, without_label=bool(offsets & unlabelled))
            copy.end()
            stream.flush()
            os.fsync(stream.fileno())
    kept = np.delete(rows, list(task.drop), axis=0)
    if not len(kept):
        return ShardResult(name, None, tuple(bad), task.tar, task.index)
    unknown = set(rows[:, 0].tolist()) - copy.moved.keys() - dropped
    if unknown:
        raise DataError(
            f"{task.source.folder / task.shard.index_name} points at byte {min(unknown)}, where no file of {name} starts; "
            f"`python -m data_prep verify {task.source.folder}` checks all rows."
        )
    kept[:, 2] = [NONE if offset in unlabelled else label for offset, label in kept[:, ::2].tolist()]
    kept[:, 0] = [copy.moved[offset] for offset in kept[:, 0].tolist()]
    write_index(task.index, kept)
    size, sha256, index_sha256 = task.tar.stat().st_size, file_sha256(task.tar), file_sha256(task.index)
    return ShardResult(name, Shard(name, len(kept), size, sha256, index_sha256), tuple(bad), task.tar, task.index)


class _Copy:
    """Samples of a tar, one after the other, on their way into another one."""

    def __init__(self, content: mmap.mmap, stream: IO[bytes]) -> None:
        self._content, self._stream = content, stream
        self._read = 0  # bytes of the old tar
        self.moved: dict[int, int] = {}  # the new position of a file's bytes by the old one

    def skip(self, sample: TarSample) -> None:
        self._read = _end(max(file.offset + file.size for file in sample.files.values()))

    def write(self, sample: TarSample, *, without_label: bool) -> None:
        if without_label:  # before labels in KEY.json, which stay there
            self._stream.write(_no_label(sample.key))
        for kind, file in sample.files.items():
            end = _end(file.offset + file.size)
            if not (without_label and kind.rpartition(".")[2] == "cls"):
                self.moved[file.offset] = self._stream.tell() + file.offset - self._read
                self._stream.write(self._content[self._read : end])  # from its headers on
            self._read = end

    def end(self) -> None:
        """Write the end mark, as tarfile does it."""
        size = self._stream.tell()
        record = tarfile.RECORDSIZE
        self._stream.write(bytes(-(-(size + 2 * _BLOCK) // record) * record - size))


def _end(position: int) -> int:
    return -(-position // _BLOCK) * _BLOCK


def _no_label(key: str) -> bytes:
    """KEY.cls with the label -1, as data_prep writes images without one."""
    text = str(NONE).encode()
    header = tarfile.TarInfo(f"{key}.cls")
    header.size = len(text)
    return header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + text.ljust(_BLOCK, b"\0")


def _reported(samples: Iterator[TarSample], report: Callable[[int], None]) -> Iterator[TarSample]:
    done, last = 0, time.monotonic()
    for sample in samples:
        yield sample
        done += 1
        if time.monotonic() - last > REPORT_EVERY_S:
            report(done)
            done, last = 0, time.monotonic()
    report(done)
