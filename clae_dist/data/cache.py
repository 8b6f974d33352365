"""Disk cache of remote files, shared by all processes of a node, with eviction of the least recently used.

A file NAME is complete or absent. While it is filled it is called NAME.part, locked by the process that fills it. The kernel
releases the lock when that process dies, and the next one resumes from the bytes that are there. A file that is removed while
it is mapped stays readable until it is unmapped.

The cache deletes files, so it owns only files that it created: it accepts a folder that is empty or marked as its own, refuses
one with any other file, and never touches a file of another name that is added later.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from clae_dist.data.room import FAILED, OWN, PART, ROOM, PartFile, Room
from clae_dist.errors import DataError

_LEFTOVER_S = 24 * 3600.0

MARKER = ".clae-dist-cache"
_MARK = "This folder belongs to clae-dist's cache of shards (data.cache), which deletes its least recently used files.\n"

Fill = Callable[[IO[bytes]], None]


class Cache:
    """A folder of files by name. `limit_bytes` 0: all free space but 1 GiB. `own` matches the names of the cache's files."""

    def __init__(self, folder: Path, limit_bytes: int = 0, own: re.Pattern[str] = OWN) -> None:
        self.folder, self.limit_bytes, self._own = folder, limit_bytes, own
        self.room = Room(folder, limit_bytes, own)

    def claim(self) -> None:
        """Create and mark the folder. Raises DataError for one with files that the cache did not create, and OSError."""
        if (self.folder / MARKER).is_file():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(os.listdir(self.folder)):
            if not self.room.owns(name) and name != MARKER:
                raise DataError(
                    f"data.cache keeps its files in {self.folder}, which contains {name!r}, not a file of the cache, which "
                    "deletes files. Nothing was changed; name another folder with data.cache=…"
                )
        (self.folder / MARKER).write_text(_MARK)

    def open(self, name: str, num_bytes: int, fill: Fill) -> IO[bytes]:
        """Open the file for reading. If it is absent, `fill` writes it, appending to the part of an earlier process.

        One process fills; others wait for it, and fail if it fails. `num_bytes` is the file's size, 0 if unknown.
        Raises DataError if there is no room or the folder is not the cache's, and the errors of `fill`.
        """
        assert self._own.fullmatch(name), f"{name} is not the name of a file of the cache"
        try:
            self.claim()
            return self._open(self.folder / name, num_bytes, fill)
        except OSError as error:
            raise DataError(
                f"data.cache {self.folder} cannot be used ({error.strerror or error}); fix that, or name another folder."
            ) from None

    def _open(self, path: Path, num_bytes: int, fill: Fill) -> IO[bytes]:
        while True:
            file = _opened(path) or self._fill(path, num_bytes, fill)
            if file is None:
                continue  # another process has completed it; it may be removed again before it is opened
            if not num_bytes or os.fstat(file.fileno()).st_size == num_bytes:
                _touch(path)
                return file
            file.close()
            path.unlink(missing_ok=True)  # changed by another program: the cache renames only complete files

    def _fill(self, path: Path, num_bytes: int, fill: Fill) -> IO[bytes] | None:
        """Fill the file and open it; None if another process has completed it."""
        part, failed = path.with_name(path.name + PART), path.with_name(path.name + FAILED)
        with _locked(part) as (file, waited_since):
            if path.exists():
                part.unlink()
                return None
            if waited_since and failed.exists() and failed.stat().st_mtime >= waited_since:
                raise DataError(failed.read_text())  # another try would make all processes wait as long again
            try:
                self._fill_part(part, file, num_bytes, fill)
            except DataError as error:
                failed.write_text(str(error))
                raise
            whole = part.open("rb")  # under its final name it may be evicted at any time
            os.replace(part, path)
            failed.unlink(missing_ok=True)
            return whole

    def _fill_part(self, part: Path, file: io.FileIO, num_bytes: int, fill: Fill) -> None:
        try:
            self.room.reserve(part, num_bytes)
            with PartFile(io.FileIO(os.dup(file.fileno()), "r+b"), self.room, part, num_bytes) as buffered:
                fill(buffered)
                buffered.flush()
                os.fsync(buffered.fileno())
        finally:
            self.room.give_back(part)

    def remove_leftovers(self) -> None:
        """Remove parts that no process has filled for a day, and notes about fetches that failed before that."""
        if not self.folder.is_dir():
            return
        for path in (path for kind in (PART, FAILED, ROOM) for path in self.folder.glob(f"*{kind}")):
            if not self.room.owns(path.name):
                continue
            try:
                if time.time() - path.stat().st_mtime < _LEFTOVER_S:
                    continue
                with path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            except (FileNotFoundError, BlockingIOError):  # removed, or in use
                continue


def _opened(path: Path) -> IO[bytes] | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except FileNotFoundError:
        return  # removed since it was opened, which is harmless


@contextmanager
def _locked(part: Path) -> Iterator[tuple[io.FileIO, float]]:
    """The part file, locked, and since when this process had to wait for another (0: it did not)."""
    waited_since = 0.0
    while True:
        with io.FileIO(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited_since = waited_since or time.time()
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_still(part, file):  # otherwise its owner has finished, and the name is free or that of another file
                yield file, waited_since
                return


def _is_still(path: Path, file: io.FileIO) -> bool:
    """True if the name still refers to the open file."""
    try:
        ours, there = os.fstat(file.fileno()), path.stat()
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
