"""One existing shard: check its images, write the index of the good ones, and a record of it all."""

from __future__ import annotations

import dataclasses
import json
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clae_dist.data.decode import inspect
from clae_dist.data.manifest import Shard
from clae_dist.data.tar_index import index_tar
from clae_dist.errors import DataError
from clae_dist.files import file_sha256, write_atomically
from clae_dist.reading import ReadError, read_object
from data_prep.write import REPORT_EVERY_S, write_index

_VERSION = 2  # of what is read from a shard


@dataclass(frozen=True)
class IndexTask:
    """A shard to be checked; index and record go into `parts`."""

    tar: Path
    parts: Path
    max_pixels: int

    @property
    def record(self) -> Path:
        return self.parts / f"{self.tar.name}.json"

    @property
    def fingerprint(self) -> list[int]:
        """Another one: index the shard again."""
        found = self.tar.stat()
        return [found.st_size, found.st_mtime_ns, self.max_pixels, _VERSION]


@dataclass(frozen=True)
class IndexResult:
    """The result for a shard with this `fingerprint`."""

    shard: Shard
    bad: list[tuple[str, str]]  # (path, reason)
    fingerprint: list[int]
    names: tuple[str, ...] = ()  # of the labels, where they are names rather than numbers


def finished(task: IndexTask) -> IndexResult | None:
    """The result of an earlier run, if neither shard nor settings have changed."""
    try:
        content = read_object(task.record, surrogates=True)
        shard, bad, names = Shard(**content.pop("shard")), content.pop("bad"), content.pop("names", ())
        result = IndexResult(shard, bad=[(path, reason) for path, reason in bad], names=tuple(names), **content)
        index_path = task.parts / shard.index_name
        same = result.fingerprint == task.fingerprint and file_sha256(index_path) == shard.index_sha256
    except (ReadError, KeyError, TypeError, ValueError, AttributeError, OSError):
        return None  # absent, or damaged
    return result if same else None


def index_shard(task: IndexTask, report: Callable[[int], None]) -> IndexResult:
    """Checks the images of one shard and writes its index and record into `.parts`."""
    fingerprint, name = task.fingerprint, task.tar.name
    with task.tar.open("rb") as file:
        found = index_tar(file, str(task.tar))
        good, bad, done, last = [], [], 0, time.monotonic()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for key, row in zip(found.keys, found.rows, strict=True):
                problem = inspect(content[row[0] : row[0] + row[1]], task.max_pixels).problem
                if problem:
                    bad.append((f"{name}/{key}", problem))
                else:
                    good.append(row)
                done += 1
                if time.monotonic() - last > REPORT_EVERY_S:
                    report(done)
                    done, last = 0, time.monotonic()
        report(done)
    rows = np.array(good, np.int64).reshape(-1, 3)
    index_path = task.parts / f"{name.removesuffix('.tar')}.index.npy"
    write_index(index_path, rows)
    shard = Shard(name, len(rows), fingerprint[0], file_sha256(task.tar), file_sha256(index_path))
    if task.fingerprint != fingerprint:
        raise DataError(f"{task.tar} changes while it is read; wait for that, then start anew.")
    result = IndexResult(shard, bad, fingerprint, found.names)
    write_atomically(task.record, json.dumps(dataclasses.asdict(result)).encode())
    return result
