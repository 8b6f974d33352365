"""Leases: a file names the process that writes to a folder, so that no second one does, on storage that hosts share as well.

The holder changes its file every few seconds. Who finds a lease looks for the process where it runs on this machine: one that
is dead has lost it at once. Of another machine's process only the file can be seen: one that does not change for EXPIRY_S, by
the clock of the one who watches, is taken over; clocks of two hosts are never compared. A holder that was paused for so long
finds another's lease in the place of its own, and its process ends. The lease of a run folder on object storage is an object,
created on the condition that there is none.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from clae_dist.errors import FAILED
from clae_dist.object_store import Store, store_of
from clae_dist.staging import shown_path

Say = Callable[[str], None]
BEAT_S = 5.0
EXPIRY_S = 30.0  # six beats, of which some may be late: a busy disk, a paused machine
WAIT_S = 3.0  # for a holder that is just about to end
_POLL_S = 0.25
_BYTES = 1024  # of a lease, always: it is overwritten in place


@dataclass(frozen=True)
class Holder:
    """The process that a lease names."""

    id: str
    what: str  # the command
    host: str
    machine: str  # process ids mean the same where it is the same
    pid: int
    started: int  # in the kernel's ticks: a later process may have the same id
    since: float  # in seconds since 1970, by the holder's clock

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{self.what} on host {self.host}, process {self.pid}, since {since}"

    def runs(self) -> bool | None:
        """True if the process exists, None if it is one of another machine."""
        if not self.machine or self.machine != _machine():
            return None
        return _started(self.pid) == self.started


@contextmanager
def hold(
    path: Path, what: str, refuse: type[Exception], way_out: str, *, wait_s: float = WAIT_S, say: Say = print
) -> Iterator[None]:
    """Hold the lease `path` for the command `what`; the process ends with code FAILED when another process takes it over.

    Args:
        refuse: the exception for a lease that another process holds; its message names host, process and since when.
        way_out: the end of that message.
        wait_s: how long a holder that runs may take to end.

    Raises:
        refuse: another process holds the lease.
        OSError: the file cannot be written.
    """
    lease = _lease_of(path, what)
    while not lease.take(_wait_until_free(path, refuse, way_out, wait_s, say)):
        pass  # another was quicker
    beating = threading.Thread(target=lease.beat, name="lease", daemon=True)
    beating.start()
    try:
        yield
    finally:
        lease.over.set()
        beating.join(BEAT_S)  # storage may hang
        lease.give_back()


def refuse_if_held(path: Path, refuse: type[Exception], way_out: str, *, say: Say = print) -> None:
    """Raise `refuse` if another process holds the lease `path`; remove a lease whose holder is gone."""
    stale = _wait_until_free(path, refuse, way_out, WAIT_S, say)
    with _alone(path.parent):
        _remove(path, stale)


def _lease_of(path: Path, what: str) -> _Lease:
    store = store_of(path.parent)
    return _Lease(path, what) if store is None else _ObjectLease(path, what, store)


def holder_of(path: Path) -> Holder | None:
    """The process that the lease `path` names; None without a lease, and for one that cannot be read."""
    try:
        return _parse(_read(path))
    except OSError:
        return None


class _Lease:
    """This process's side of a lease."""

    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        self._holder = Holder(
            uuid.uuid4().hex, what, os.uname().nodename, _machine(), os.getpid(), _started(os.getpid()) or 0, time.time()
        )
        self._beats = 0
        self._file = -1
        self.over = threading.Event()

    def take(self, stale: bytes) -> bool:
        """Write the lease in the place of a stale one; False if another process did so meanwhile."""
        with _alone(self._path.parent):
            _remove(self._path, stale)
            return self._create()

    def _create(self) -> bool:
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        if self._file >= 0:
            os.close(self._file)
        self._file = file
        try:
            self._write()
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _next(self) -> bytes:
        """The content of the next beat."""
        self._beats += 1
        return json.dumps({**asdict(self._holder), "beats": self._beats}).encode().ljust(_BYTES)

    def _write(self) -> None:
        os.pwrite(self._file, self._next(), 0)
        os.fsync(self._file)  # other hosts see what the server has

    def beat(self) -> None:
        """Change the lease every BEAT_S until `over`; end this process when it is another's."""
        while not self.over.wait(BEAT_S):
            other: Holder | None = None
            with suppress(OSError):  # a full or an absent disk: nobody can take the lease either
                other = self._taken()
                if other is None:
                    self._write()
            if other is not None:
                _lose(self._path, other)

    def _taken(self) -> Holder | None:
        """The other process that has the lease by now, if any."""
        content = _read(self._path)
        if not content:
            self._create()  # deleted by hand
            content = _read(self._path)
        holder = _parse(content)
        return holder if holder and holder.id != self._holder.id else None

    def _delete(self) -> None:
        self._path.unlink()

    def give_back(self) -> None:
        with suppress(OSError):
            if (holder := _parse(_read(self._path))) and holder.id == self._holder.id:
                self._delete()
        if self._file >= 0:
            os.close(self._file)


class _ObjectLease(_Lease):
    """This process's side of a lease in a bucket."""

    def __init__(self, path: Path, what: str, store: Store) -> None:
        super().__init__(path, what)
        self._store = store

    def _create(self) -> bool:
        return self._store.create(self._path.name, self._next())

    def _write(self) -> None:
        self._store.put(self._path.name, self._next())

    def _delete(self) -> None:
        self._store.delete([self._path.name])


def _lose(path: Path, holder: Holder) -> None:
    text = (
        f"clae: this process stood still for so long that its lease {shown_path(path)} expired, and another has taken it: "
        f"{holder}. This process ends without writing anything more."
    )
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
    os._exit(FAILED)


def _wait_until_free(path: Path, refuse: type[Exception], way_out: str, wait_s: float, say: Say) -> bytes:
    """The content of a lease whose holder is gone; b"" if there is none. Raises `refuse`."""
    content, before = _read(path), time.monotonic()
    waited_s = unchanged_s = 0.0
    beats = told = False
    while content:
        holder = _parse(content)
        runs = holder.runs() if holder else None
        if runs is False or (runs is None and unchanged_s >= EXPIRY_S):
            break
        if waited_s >= wait_s and (runs or (beats and unchanged_s < 2 * BEAT_S)):
            raise refuse(
                f"{shown_path(path.parent)} is in use by {holder or 'a process that does not say its name'}; {way_out}"
            )
        if not told and waited_s >= min(wait_s, 1.0) and (runs is None or wait_s > WAIT_S):
            told = True
            name = holder or "a process that does not say its name"
            if runs:
                say(f"{shown_path(path.parent)} is in use by {name}; waiting {wait_s:g} s for its end")
            else:
                say(f"{shown_path(path.parent)} was in use by {name}; waiting {max(wait_s, EXPIRY_S):g} s for a sign of life")
        time.sleep(_POLL_S)
        found, now = _read(path), time.monotonic()
        awake_s, before = min(now - before, 4 * _POLL_S), now  # this machine may be paused as well
        waited_s += awake_s
        unchanged_s = unchanged_s + awake_s if found == content else 0.0
        beats = beats or found != content
        content = found
    if content and told:
        say(f"{shown_path(path.parent)} is free now: its lease was not renewed")
    return content


def _remove(path: Path, stale: bytes) -> None:
    if stale and _read(path) == stale:
        if store := store_of(path.parent):
            store.delete([path.name])
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process of this machine removes and writes a lease; storage without locks leaves that to `beat`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    """The content of the lease; b"" without one."""
    if store := store_of(path.parent):
        return store.get_or(path.name)
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return b""
    try:
        return os.read(file, _BYTES) or b"empty"  # just created
    finally:
        os.close(file)


def _parse(content: bytes) -> Holder | None:
    """The process that a lease names; None where that cannot be read, as in one that was just created."""
    try:
        fields = json.loads(content)
        fields.pop("beats")
        holder = Holder(**fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    texts, numbers = (holder.id, holder.what, holder.host, holder.machine), (holder.pid, holder.started, holder.since)
    fine = all(isinstance(text, str) and text.isprintable() for text in texts)
    fine = fine and all(isinstance(number, int | float) and 0 <= number < 1e12 for number in numbers)
    return holder if fine else None


def _machine() -> str:
    """This boot of this machine and its namespace of processes; "" where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process of this machine was started, in the kernel's ticks; None if there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
