"""Copies of runs on object storage, for commands that read them: fetched before, and sent back where the command wrote."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clae_dist.object_store import FIRST_TRIES_S, Entry, Store, store_of
from clae_dist.runs.checkpoint.objects import stage_checkpoints
from clae_dist.runs.folder import (
    BAD_SAMPLES_FILE,
    CONFIG_FILE,
    ENDS_FILE,
    EVALUATION_FILE,
    EXPORT,
    GOODPUT_FILE,
    HEARTBEAT_FILE,
    IDENTITY_FILE,
    METRICS_FILE,
    READMITTED_FILE,
    REPORT,
    SUMMARY_FILE,
    TRAINING_LEASE,
    RunFolder,
)
from clae_dist.runs.record import TO_READ, Record
from clae_dist.wording import count_of

_WRITTEN = (EVALUATION_FILE, SUMMARY_FILE, BAD_SAMPLES_FILE, READMITTED_FILE, REPORT, EXPORT)
_LISTED = (CONFIG_FILE, IDENTITY_FILE, METRICS_FILE, ENDS_FILE)
_OF_STATUS = (CONFIG_FILE, HEARTBEAT_FILE, GOODPUT_FILE, ENDS_FILE)
_EXPORTED = "config.json"  # of an export, which is a folder of its own
Say = Callable[[str], None]


@contextmanager
def copied(folders: Iterable[Path], say: Say) -> Iterator[None]:
    """Inside, the folders hold the records of the runs that they stage, without checkpoints, which are fetched when opened.

    Files that are written inside are sent back. Raises StoreError, and ConfigError for a client that is not installed.
    """
    records = [record for folder in dict.fromkeys(folders) if (record := fetch(folder))]
    try:
        yield
    finally:
        for record in records:
            if sent := record.push(_WRITTEN):
                say(f"{count_of(len(sent), 'file')} sent to {record.store.url}")


def fetch(folder: Path) -> Record | None:
    """Fetch the record of the run, or the files of the export, that a folder stages. None for an ordinary folder.

    Raises StoreError, and ConfigError for a client that is not installed.
    """
    record = Record.of(folder)
    if record:
        entries = _first_entries(record.store)
        record.pull(TO_READ if CONFIG_FILE in entries else _of_export(entries))
    return record


def _first_entries(store: Store) -> dict[str, Entry]:
    """The objects of a store that this command has not reached before: a user waits for the error."""
    return Store(store.url, FIRST_TRIES_S).entries()


def _of_export(entries: Iterable[str]) -> list[str]:
    """The files of an export; nothing of a folder that is neither a run nor an export."""
    names = [name for name in entries if "/" not in name]
    return names if _EXPORTED in names else []


def copy_listed(folder: Path) -> None:
    """Fetch what `clae runs` reads of all runs below a staged folder; nothing for an ordinary one. Raises StoreError."""
    store = store_of(folder)
    if store is None:
        return
    entries = _first_entries(store)
    runs = {name.rpartition("/")[0] for name in entries if name.rpartition("/")[2] == CONFIG_FILE}
    for path in sorted(folder.rglob(CONFIG_FILE)):  # of runs that were deleted
        if path.parent.relative_to(folder).as_posix().removeprefix(".") not in runs:
            path.unlink()
    for run in runs:
        path = folder / run
        record = Record.of(path)
        assert record is not None
        record.pull(_LISTED)
        _copy_lease(record.store, path, entries, f"{run}/{TRAINING_LEASE}" if run else TRAINING_LEASE)
        _date(RunFolder(path).metrics_file, store, entries, f"{run}/" if run else "")


def copy_state(folder: Path) -> None:
    """Fetch what `clae status` reads of a run; nothing for an ordinary folder. Raises StoreError."""
    record = Record.of(folder)
    if record is None:
        return
    entries = _first_entries(record.store)
    record.pull(_OF_STATUS)
    _copy_lease(record.store, folder, entries, TRAINING_LEASE)
    beat = RunFolder(folder).heartbeat_file
    if HEARTBEAT_FILE in entries and beat.is_file():
        _set_age(beat, record.store.age_s(entries[HEARTBEAT_FILE].changed))
    stage_checkpoints(folder)


def _copy_lease(store: Store, path: Path, entries: dict[str, Entry], name: str) -> None:
    """Copy the lease, as old as the store says that it is."""
    lease = RunFolder(path).training_lease
    lease.unlink(missing_ok=True)
    if name in entries and (content := store.get_or(TRAINING_LEASE)):
        lease.write_bytes(content)
        _set_age(lease, store.age_s(entries[name].changed))


def _date(path: Path, store: Store, entries: dict[str, Entry], prefix: str) -> None:
    """Give the metrics the age of their newest part."""
    parts = [entry.changed for name, entry in entries.items() if name.startswith(f"{prefix}{METRICS_FILE}.")]
    if parts and path.is_file():
        _set_age(path, store.age_s(max(parts)))


def _set_age(path: Path, age_s: float) -> None:
    moment = time.time() - age_s
    os.utime(path, (moment, moment))
