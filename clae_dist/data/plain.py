"""Plain WebDataset shards without a manifest: index them from their tar headers and build a manifest in memory."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import IO
from urllib.parse import unquote, urlsplit

import numpy as np

from clae_dist.data.classes import classes_of, renumbered
from clae_dist.data.fetch import digest_check, fetch
from clae_dist.data.manifest import Manifest, Shard, content_digest
from clae_dist.data.remote import MAX_OPEN, Fetching
from clae_dist.data.tar_index import Dropped, TarIndex, begins_as_tar, index_tar
from clae_dist.data.together import together
from clae_dist.data.urls import local_path, redact, redact_list, scheme
from clae_dist.errors import DataError
from clae_dist.progress import Progress
from clae_dist.reading import Check, ReadError, expect, is_count, is_list_of, is_text, open_regular, parse_object, read_bytes
from clae_dist.world import World

Say = Callable[[str], None]
_CONNECTIONS = 4
_ROUND = 16  # shards of a rank
_RECORD, _INDEX = ".labels.json", ".labels.npy"  # in the cache; an older version's .json and .npy knew no names
_ONE_FOR_ALL = "empty data.cache on every node, and make sure that all nodes read the same shards"
_LOST = (
    "no checksums (a changed shard is not noticed), no source and licence, no check of the images beforehand, no split but "
    "train; `python -m data_prep index` adds a manifest to shards of this machine"
)


@dataclass(frozen=True)
class ShardRecord:
    """The result of indexing a plain shard."""

    shard: Shard  # sha256 is "" for a local shard, whose bytes are not read
    labels: tuple[str, ...]  # the different ones, by name
    unlabelled: int
    dropped: Dropped


@dataclass(frozen=True)
class PlainShards:
    """Shards by name, with the URL, path or command that each is read from."""

    text: str = field(repr=False)  # as the user wrote it
    sources: dict[str, str] = field(repr=False)
    fetching: Fetching
    classes: tuple[str, ...] = field(default=(), repr=False)  # of all shards, known after indexing

    @property
    def where(self) -> str:
        return redact_list(self.text)

    @property
    def any_remote(self) -> bool:
        return any(map(scheme, self.sources.values()))

    def max_open(self, shard_bytes: Sequence[int], processes: int) -> int:
        return self.fetching.max_open(shard_bytes, processes) if self.any_remote else MAX_OPEN

    def describe(self) -> str:
        return self.fetching.describe() if self.any_remote else f"indices kept in {self.fetching.cache.folder}"

    def open(self, shard: Shard, stop: threading.Event | None = None) -> IO[bytes]:
        return self._tar(shard.name, shard, stop)

    def open_index(self, shard: Shard) -> IO[bytes]:
        def fill(part: IO[bytes]) -> None:
            with self.open(shard) as file:
                part.write(_stored(index_tar(file, shard.name)))

        file = self.fetching.cache.open(f"{self._key(shard.name)}{_INDEX}", 0, fill)
        found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        file.seek(0)
        if found != shard.index_sha256:
            file.close()
            raise DataError(f"{shard.name} has other content here than where it was indexed; {_ONE_FOR_ALL}.")
        return _with_places(file, self.classes)

    def other_copy(self, records: dict[str, ShardRecord]) -> str:
        """The shard of which this machine's cache has another version than the indexed one; "" for none. Fetches nothing."""
        for name, record in records.items():
            try:
                cached = _record_from_json(
                    read_bytes(self.fetching.cache.folder / f"{self._key(name)}{_RECORD}", 64 << 20)
                ).shard
            except ReadError:
                continue  # absent, or damaged and then made again
            if cached != record.shard:
                return (
                    f"{name} in {self.fetching.cache.folder} of {platform.node()} has other content (sha256 {cached.sha256!r}) "
                    f"than when it was indexed ({record.shard.sha256!r}): it has changed since; {_ONE_FOR_ALL}."
                )
        return ""

    def record(self, name: str, stop: threading.Event) -> ShardRecord:
        """The summary of a shard's index, from the cache or made now. Raises DataError for anything but a tar of images."""

        def fill(part: IO[bytes]) -> None:
            part.write(json.dumps(asdict(self._make_record(name, stop))).encode())

        entry = f"{self._key(name)}{_RECORD}"
        with self.fetching.cache.open(entry, 0, fill) as file:
            try:
                return _record_from_json(file.read())
            except ReadError:  # a power cut, or another version: it is made again
                (self.fetching.cache.folder / entry).unlink(missing_ok=True)
        with self.fetching.cache.open(entry, 0, fill) as file:
            return _record_from_json(file.read())

    def _make_record(self, name: str, stop: threading.Event) -> ShardRecord:
        with self._tar(name, None, stop) as file:
            index = index_tar(file, name)
            size = file.seek(0, 2)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest() if scheme(self.sources[name]) else ""  # type: ignore[arg-type]
        stored = _stored(index)

        def write(part: IO[bytes]) -> None:
            part.write(stored)

        self.fetching.cache.open(f"{self._key(name)}{_INDEX}", 0, write).close()
        shard = Shard(name, len(index.rows), size, sha256, hashlib.sha256(stored).hexdigest())
        return ShardRecord(shard, tuple(index.label_names.values()), int((index.rows[:, 2] < 0).sum()), index.dropped)

    def _tar(self, name: str, shard: Shard | None, stop: threading.Event | None) -> IO[bytes]:
        source = self.sources[name]
        if not scheme(source):
            try:
                return open_regular(local_path(source))
            except ReadError as error:
                raise DataError(f"{source} cannot be read ({error}); correct data.shards.") from None
        size = shard.bytes if shard else 0
        check = digest_check(size, shard.sha256) if shard else _is_tar

        def fill(part: IO[bytes]) -> None:
            fetch(source, part, name, self.fetching.patience, check, size, stop, begins_as_tar)

        return self.fetching.cache.open(f"{self._key(name)}.tar", size, fill)

    def _key(self, name: str) -> str:
        """The name of a source's files in the cache; it reveals no secret."""
        source = self.sources[name]
        if not scheme(source):
            found = os.stat(local_path(source))
            source = f"{os.path.realpath(local_path(source))} {found.st_size} {found.st_mtime_ns}"
        elif scheme(source) != "pipe":
            parts = urlsplit(source)
            source = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        return f"plain-{hashlib.sha256(source.encode(errors='surrogateescape')).hexdigest()}"


def _stored(index: TarIndex) -> bytes:
    """The rows, and the names of the labels behind them where there are any."""
    stream = io.BytesIO()
    np.save(stream, index.rows)
    return stream.getvalue() + (json.dumps(index.names).encode() if index.names else b"")


def _with_places(file: IO[bytes], classes: tuple[str, ...]) -> IO[bytes]:
    """The rows of a stored index as a npy file, labels as positions among `classes`."""
    with file:
        rows = np.lib.format.read_array(file, allow_pickle=False)
        stored = file.read()
    names = tuple(json.loads(stored)) if stored else ()
    labels = [label for label in np.unique(rows[:, 2]).tolist() if label >= 0]
    rows[:, 2] = renumbered(rows[:, 2], {label: names[label] if names else str(label) for label in labels}, classes)
    stream = io.BytesIO()
    np.save(stream, rows)
    stream.seek(0)
    return stream


_SHARD: dict[str, Check] = {
    **dict.fromkeys(("name", "sha256", "index_sha256"), is_text),
    **dict.fromkeys(("samples", "bytes"), is_count),
}
_FIELDS: dict[str, Check] = {
    **dict.fromkeys(("shard", "dropped"), lambda value: isinstance(value, dict)),
    "labels": is_list_of(is_text),
    "unlabelled": is_count,
}


def _record_from_json(data: bytes) -> ShardRecord:
    """Raises ReadError."""
    content = parse_object(data, surrogates=True)
    expect(content, _FIELDS)
    expect(content["shard"], _SHARD)
    try:
        dropped = Dropped()
        dropped.include(Dropped(**content["dropped"]))
        return ShardRecord(Shard(**content["shard"]), tuple(content["labels"]), content["unlabelled"], dropped)
    except (KeyError, TypeError, AttributeError) as error:
        raise ReadError(f"{type(error).__name__}: {error}") from None


def _is_tar(file: IO[bytes]) -> str:
    try:
        index_tar(file, "the stream")
    except DataError as error:
        return str(error).split("; ")[0]
    return ""


def open_plain(
    text: str, entries: list[str], fetching: Fetching, world: World, say: Say, progress: Callable[[], None] = lambda: None
) -> Manifest:
    """Build a manifest of plain shards, all in the split `train`. Every rank indexes its share. Collective.

    Raises DataError on every rank.
    """
    files = PlainShards(text, _named(entries), fetching)
    names = list(files.sources)
    if files.any_remote and world.is_main:
        fetching.cache.remove_leftovers()
    now = " now: each is fetched once, unless it is in the cache" if files.any_remote else ""
    say(f"data: {len(names)} plain shards without a manifest: {_LOST}. They are indexed{now}; {files.describe()}")
    mine: dict[str, ShardRecord] = {}
    indexing = Progress(len(names), name="shards", label="data: indexing, ", say=say)

    def waiting() -> None:
        progress()
        indexing.add(0)

    # In rounds, so that a rank whose shards are in the cache does not wait for the others longer than the timeout.
    size = _ROUND * world.size
    for first in range(0, len(names), size):
        problem = ""
        share = names[first : first + size][world.rank :: world.size]
        try:
            mine.update(together(world, partial(_index, files, share), waiting))
        except DataError as error:
            problem = str(error)
        except Exception as error:  # of any type: all ranks raise it together
            problem = f"{type(error).__name__}: {error}"
        world.raise_together(DataError, problem)
        indexing.add(min(size, len(names) - first))
    labels = {label for record in mine.values() for label in record.labels}
    mine = {name: replace(record, labels=()) for name, record in mine.items()}  # thousands of shards have the same labels
    parts = world.gather_objects((mine, labels))
    records = {name: record for part, _ in parts for name, record in part.items()}
    world.raise_together(DataError, files.other_copy(records) if world.local_rank == 0 else "")
    found = [records[name] for name in names]
    for line in _report(found):
        say(f"data: {line}")
    return _manifest(files, found, classes_of(set().union(*(labels for _, labels in parts))))


def _report(records: list[ShardRecord]) -> list[str]:
    """Return lines about unused parts of the shards, and about unlabelled images where others have a label."""
    dropped = Dropped()
    for record in records:
        dropped.include(record.dropped)
    lines = dropped.lines()
    without, images = (sum(counts) for counts in zip(*((r.unlabelled, r.shard.samples) for r in records), strict=True))
    if 0 < without < images:
        lines.append(f"images without a label: {without:,} of {images:,}")
    return lines


def _index(files: PlainShards, names: list[str]) -> list[tuple[str, ShardRecord]]:
    """Names and records in the order of completion. Raises DataError as soon as one shard is unusable."""
    stop = threading.Event()
    with ThreadPoolExecutor(_CONNECTIONS) as threads:
        pending = {threads.submit(files.record, name, stop): name for name in names}
        try:
            return [(pending[done], done.result()) for done in as_completed(pending)]
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read ({error.strerror}); correct data.shards.") from None
        finally:
            stop.set()
            threads.shutdown(wait=False, cancel_futures=True)


def _manifest(files: PlainShards, records: list[ShardRecord], classes: tuple[str, ...]) -> Manifest:
    shards = tuple(record.shard for record in records)
    facts = {"plain shards": [(s.name, s.bytes, s.samples, s.index_sha256) for s in shards]}
    stem = re.sub(r"\{.*?\}|\.tar$", "", files.where.rsplit("/", 1)[-1]).strip("-_. ")
    return Manifest(
        folder=files.fetching.cache.folder,
        name=stem or "shards",
        source=files.where,
        licence="not stated",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        classes=classes,
        splits={"train": shards},
        quarantined=0,
        preparation={},
        digest=content_digest(facts),
        files=replace(files, classes=classes),
    )


def _named(entries: list[str]) -> dict[str, str]:
    """A name for every entry: that of its file, prefixed by a number if two are equal; pipes are numbered."""
    plain = [f"pipe-{number:06d}.tar" if scheme(entry) == "pipe" else _file_name(entry) for number, entry in enumerate(entries)]
    unique = len(set(plain)) == len(plain)
    return {name if unique else f"{number:06d}-{name}": e for number, (name, e) in enumerate(zip(plain, entries, strict=True))}


def _file_name(entry: str) -> str:
    path = urlsplit(redact(entry)).path if scheme(entry) else entry
    return unquote(path.rsplit("/", 1)[-1]).replace("/", "_") or "shard.tar"
