"""Accounting of the cache's space for all processes of a node: complete files, files being fetched, and their final size.

The process that fills NAME.part declares its final size by .NAME.room, a sparse file of that size. It counts as long as
NAME.part is locked; the kernel releases the lock when the process dies.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from clae_dist.errors import DataError

PART, FAILED, ROOM = ".part", ".failed", ".room"
OWN = re.compile(r"(plain-)?[0-9a-f]{64}(\.labels)?\.(tar|npy|json)")  # names of the cache's files, unlike those of others
_FREE_BYTES = 1 << 30  # of the disk that stay free if there is no limit
_LOCK = ".room.lock"
_SCANS = 1000


@dataclass(frozen=True)
class _Held:
    """A file of the cache; `num_bytes` is its final size."""

    used_ns: int
    path: Path
    num_bytes: int
    on_disk: int
    removable: bool  # complete, or a part that no process fills
    coming: bool  # a process fills it and has reserved its space


class Room:
    """`limit_bytes` 0: all free space but 1 GiB. Files whose names do not match `own` are neither counted nor removed."""

    def __init__(self, folder: Path, limit_bytes: int, own: re.Pattern[str] = OWN) -> None:
        self._folder, self._limit_bytes, self._own = folder, limit_bytes, own

    def owns(self, name: str) -> bool:
        """True for the names of the cache's files and of its auxiliary files."""
        if name == _LOCK:
            return True
        if name.startswith(".") and name.endswith(ROOM):
            name = name[1:].removesuffix(ROOM)
        return bool(self._own.fullmatch(name.removesuffix(PART).removesuffix(FAILED)))

    def size(self) -> int:
        """The total bytes allowed: the limit, or the space of the disk."""
        if self._limit_bytes:
            return self._limit_bytes
        there = next(folder for folder in (self._folder, *self._folder.parents) if folder.is_dir())
        own = 0
        for path in self._folder.glob("[!.]*"):
            if not self.owns(path.name):
                continue
            with suppress(FileNotFoundError):  # renamed on completion, or removed
                own += path.stat().st_size
        return max(0, shutil.disk_usage(there).free + own - _FREE_BYTES)

    def reserve(self, part: Path, num_bytes: int) -> None:
        """Reserve `num_bytes` for `part`, which this process has locked, by evicting the least recently used files.

        Waits for other fetches if they take the space, and exceeds the limit if nothing else can be evicted. Raises DataError
        if the disk is too small.
        """
        while (other := self._try(part, num_bytes)) is not None:
            try:
                with other.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_SH)  # until it is complete, or its process has ended
            except FileNotFoundError:
                continue

    def _try(self, part: Path, num_bytes: int) -> Path | None:
        """None once the space is reserved; else a part to wait for."""
        with self._alone():
            _room_of(part).unlink(missing_ok=True)  # of a process that died; one that waits must not appear to fill
            held, fits = self._clear(part, num_bytes)
            coming = next((one.path for one in held if one.coming), None)
            if coming is not None and not fits:
                return coming
            _note(part, num_bytes)
            return None

    def grow(self, part: Path, num_bytes: int) -> int:
        """Reserve space for a part of unknown size, without waiting. Returns the size at which it must call again.

        Raises DataError if the disk is too small.
        """
        with self._alone():
            held, _ = self._clear(part, num_bytes)
            disk, more = shutil.disk_usage(self._folder), num_bytes - _size(part)
            if disk.free - more < min(_FREE_BYTES, disk.total // 20):  # the stream may be endless
                raise DataError(
                    f"data.cache {self._folder} has {disk.free / 1e9:.1f} GB free, too little for a shard of unknown size, of "
                    f"which {num_bytes / 1e9:.1f} GB came; free some, or name a folder on another disk."
                )
            larger = num_bytes + num_bytes // 8
            reserved = larger if self._fits(held, part, larger) else num_bytes
            _note(part, reserved)
            return reserved

    def give_back(self, part: Path) -> None:
        _room_of(part).unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self._folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _clear(self, part: Path, num_bytes: int) -> tuple[list[_Held], bool]:
        """Evict the least recently used files until `part` fits. Returns the remaining files and True if it fits."""
        held = sorted(self._held(part), key=lambda one: one.used_ns, reverse=True)
        for one in [one for one in reversed(held) if one.removable]:
            if self._fits(held, part, num_bytes):
                break
            if _remove(one.path):
                held.remove(one)
        fits, more = self._fits(held, part, num_bytes), num_bytes - _size(part)
        free = shutil.disk_usage(self._folder).free
        if free < more and not any(one.coming for one in held):
            raise DataError(
                f"data.cache {self._folder} has {free / 1e9:.1f} GB free, the next shard needs {more / 1e9:.1f} GB; free "
                "some, or name a folder on another disk."
            )
        return held, fits

    def _fits(self, held: list[_Held], part: Path, num_bytes: int) -> bool:
        if self._limit_bytes and sum(one.num_bytes for one in held) + num_bytes > self._limit_bytes:
            return False
        spare = 0 if self._limit_bytes else _FREE_BYTES
        to_come = sum(one.num_bytes - one.on_disk for one in held) + num_bytes - _size(part)
        return shutil.disk_usage(self._folder).free >= to_come + spare

    def _held(self, mine: Path) -> list[_Held]:
        for _ in range(_SCANS):
            try:
                return list(self._scan(mine))
            except FileNotFoundError:  # a part that was completed meanwhile has another name, and counts
                continue
        raise DataError(f"data.cache {self._folder} cannot be listed, or was removed; name another folder.")

    def _scan(self, mine: Path) -> Iterator[_Held]:
        with os.scandir(self._folder) as entries:
            for entry in entries:
                path = Path(entry.path)
                passed = entry.name.startswith(".") or entry.name.endswith(FAILED) or not self.owns(entry.name)
                if passed or path == mine:
                    continue
                stat = entry.stat()
                filling = entry.name.endswith(PART) and _is_locked(path)
                noted = _size(_room_of(path)) if filling else 0
                yield _Held(
                    used_ns=stat.st_mtime_ns,
                    path=path,
                    num_bytes=max(stat.st_size, noted),
                    on_disk=stat.st_size,
                    removable=not filling,
                    coming=noted > 0,
                )


class PartFile(io.BufferedRandom):
    """A part of unknown size, which reserves space as it grows."""

    def __init__(self, file: io.FileIO, room: Room, path: Path, reserved: int) -> None:
        super().__init__(file)
        self._room, self._path, self._reserved = room, path, reserved

    def write(self, data: bytes) -> int:  # type: ignore[override]
        end = self.tell() + len(data)
        if end > self._reserved:
            self._reserved = self._room.grow(self._path, end)
        return super().write(data)


def _room_of(part: Path) -> Path:
    return part.with_name(f".{part.name.removesuffix(PART)}{ROOM}")


def _note(part: Path, num_bytes: int) -> None:
    with _room_of(part).open("wb") as file:
        file.truncate(num_bytes)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_locked(part: Path) -> bool:
    with part.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _remove(path: Path) -> bool:
    """Remove the file unless another process has begun to fill it. Returns True if it is gone."""
    try:
        with path.open("rb") as file:
            if path.suffix == PART:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:  # removed by another process
        return True
    return True
