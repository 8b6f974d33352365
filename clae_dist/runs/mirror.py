"""The record of a running run on object storage: fetched before it, sent every few seconds during it, and at its end.

A STOP object that somebody puts beside the record stops the run, as a STOP file in a run folder does. The launcher deletes it
before it starts ranks, not the ranks: a request that comes while they start counts.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clae_dist.errors import CheckpointError, ConfigError
from clae_dist.object_store import RETRY_S, Store, StoreError, check_store, store_of
from clae_dist.redact import redact_text
from clae_dist.runs.folder import STOP_FILE, RunFolder
from clae_dist.runs.record import AT_THE_END, OF_A_RANK, TO_RESUME, Record
from clae_dist.staging import url_of
from clae_dist.world import World

EVERY_S = 5.0
_END_RETRY_S = 60.0
_SHORT_RETRY_S = 10.0  # where somebody waits who can try again, or do without
Say = Callable[[str], None]


def prepare(folder: Path) -> None:
    """Check the bucket of a run and fetch its record, before ranks start; nothing for an ordinary folder.

    Raises StoreError, and ConfigError for a client that is not installed.
    """
    check_store(folder)
    if record := Record.of(folder):
        record.pull(TO_RESUME)


def check_nodes(folder: Path, world: World) -> None:
    """Check the bucket of a run from each of several nodes, whose credentials and networks are their own. Collective.

    Raises CheckpointError on every rank; the text names the node.
    """
    if not url_of(folder) or world.size == world.local_size:  # the launcher has checked it here
        return
    problem = ""
    if world.local_rank == 0:
        try:
            check_store(folder, RETRY_S)
        except (StoreError, ConfigError) as error:
            problem = f"on {platform.node()}: {error}"
    world.raise_together(CheckpointError, problem)


class Mirror:
    """Sends the record of a run that this rank writes. Does nothing for an ordinary folder."""

    def __init__(self, folder: Path, world: World, say: Say) -> None:
        self._record, self._world, self._say = Record.of(folder), world, say
        self._folder, self._stop = folder, store_of(folder)
        self._over, self._one = threading.Event(), threading.Lock()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)

    def fetch(self) -> None:
        """Fetch the record into the staging folder of every node. Collective."""
        if self._record is not None:
            self._together(self._world.local_rank == 0, _pull_all)

    def share(self) -> None:
        """Send the record of rank 0's node to the other nodes, and go on sending it in the background. Collective."""
        if self._record is None:
            return
        self._together(self._world.is_main, _push_all)
        others = self._world.local_rank == 0 and not self._world.is_main
        self._together(others, lambda record: record.pull(TO_RESUME))
        if self._world.is_main:
            self._thread.start()

    def close(self) -> None:
        """Send the rest."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._record is not None and (self._world.is_main or self._world.local_rank == 0):
            self._record.store = Store(self._record.store.url, _END_RETRY_S)
            self._send(None if self._world.is_main else OF_A_RANK)

    def _together(self, acts: bool, action: Callable[[Record], object]) -> None:
        problem = ""
        if acts and self._record is not None:
            try:
                action(self._record)
            except OSError as error:
                # Credentials, the network and the disk are a node's own.
                nodes = self._world.size > self._world.local_size
                problem = f"on {platform.node()}: {error}" if nodes else str(error)
        self._world.raise_together(CheckpointError, problem)

    def _run(self) -> None:
        assert self._stop is not None
        while not self._over.wait(EVERY_S):
            self._send(None, without=AT_THE_END)
            with suppress(StoreError):
                if request := self._stop.get_or(STOP_FILE):
                    (self._folder / STOP_FILE).write_bytes(request)

    def _send(self, names: tuple[str, ...] | None, without: tuple[str, ...] = ()) -> None:
        """Send what has changed; a failure is reported once, until it works again."""
        assert self._record is not None
        try:
            with self._one:
                self._record.push(names, without=without)
        except OSError as error:
            if not self._failed:
                self._say(f"the record of the run waits in {self._folder}: {error}")
            self._failed = True
        else:
            if self._failed:
                self._say(f"{url_of(self._folder)} has all of the record again")
            self._failed = False


def _pull_all(record: Record) -> None:
    (record.folder / STOP_FILE).unlink(missing_ok=True)  # of an earlier start; a new request is in the bucket
    record.pull(TO_RESUME)


def _push_all(record: Record) -> None:
    record.push()
    record.delete_merged()


@contextmanager
def mirrored(folder: Path, world: World, say: Say) -> Iterator[Mirror]:
    """Inside, the record of a run on object storage is fetched, and sent once `share` was called. Collective.

    Raises CheckpointError on every rank.
    """
    mirror = Mirror(folder, world, say)
    mirror.fetch()
    try:
        yield mirror
    finally:
        mirror.close()


def send_rest(folder: Path) -> None:
    """Send what a run's processes on this machine wrote before they were killed; nothing for an ordinary folder.

    Raises StoreError.
    """
    if store := store_of(folder, _END_RETRY_S):
        Record(folder, store).push_ends()


def fetch_ends(folder: Path) -> None:
    """Fetch how starts have ended on all nodes; nothing for an ordinary folder. Without the store, what is here counts."""
    if store := store_of(folder, _SHORT_RETRY_S):
        with suppress(OSError):
            Record(folder, store).pull_ends()


def send_file(path: Path, folder: Path) -> None:
    """Send one file of the run folder; nothing for an ordinary folder. Raises StoreError."""
    if store := store_of(folder, _SHORT_RETRY_S):
        store.put(path.relative_to(folder).as_posix(), path)


def add_to_console(folder: Path, lines: str) -> None:
    """Append lines to the console of a run, from any of its processes on any node. Raises OSError."""
    text = redact_text(lines)
    store = store_of(folder, _SHORT_RETRY_S)
    if store is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with RunFolder(folder).console_file.open("a") as file:
        file.write(text)
    if store is not None:
        Record(folder, store).put_lines(text)


# ---- requests to stop, from a process that is no rank ----


def ask_to_stop(folder: Path, reason: str) -> None:
    """Ask the ranks of a run to save and leave, on whichever nodes they are. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    RunFolder(folder).stop_file.write_text(reason)
    if store := store_of(folder, _SHORT_RETRY_S):
        store.put(STOP_FILE, reason.encode())


def stop_asked(folder: Path) -> str:
    """The reason of a request to stop, "" if there is none. Raises OSError."""
    if store := store_of(folder, _SHORT_RETRY_S):
        return store.get_or(STOP_FILE).decode(errors="replace").strip()
    path = RunFolder(folder).stop_file
    return path.read_text().strip() if path.exists() else ""


def forget_stop(folder: Path) -> None:
    """Withdraw a request to stop, or one that a killed launcher left behind. Raises OSError."""
    RunFolder(folder).stop_file.unlink(missing_ok=True)
    if store := store_of(folder, _SHORT_RETRY_S):
        store.delete([STOP_FILE])
