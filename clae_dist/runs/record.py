"""The record of a run on object storage: all files of its folder but checkpoints, the same in a staging folder and a bucket.

Files that grow (metrics, goodput, console) are appended in parts: metrics.jsonl.00001-000000000000, … hold the bytes from the
position that follows the number. A part begins at the end of those before, or at 0: then it replaces them, in one put, as when
the file was cut or rewritten, or there are many parts. Other files are replaced as a whole.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clae_dist.files import write_atomically
from clae_dist.object_store import Entry, NoObjectError, Store, store_of
from clae_dist.reading import is_number, parse_line
from clae_dist.runs.folder import (
    BAD_SAMPLES_FILE,
    CHECKPOINTS,
    CONFIG_FILE,
    CONSOLE_FILE,
    ENDS_FILE,
    EVALUATION,
    EVALUATION_FILE,
    EVALUATION_LEASE,
    EXPORT,
    FILES,
    FOLDERS,
    GOODPUT_FILE,
    HANG,
    IDENTITY_FILE,
    INITIAL,
    METRICS_FILE,
    NONFINITE,
    PREFIXES,
    PROFILE,
    PSEUDO_LABELS,
    RAY,
    READMITTED_FILE,
    REPORT,
    STOP_FILE,
    SUMMARY_FILE,
    TENSORBOARD,
    TRAINING_LEASE,
)

APPENDED = (METRICS_FILE, GOODPUT_FILE, CONSOLE_FILE, ENDS_FILE)
_ELSEWHERE = {CHECKPOINTS, TRAINING_LEASE, EVALUATION_LEASE, STOP_FILE}  # objects of their own
_ENDS = "ends"  # in the bucket alone: ends that ranks of any node report, an object each, until rank 0's node has sent them
_LINES = "console"  # likewise: lines of the console that another process than rank 0 wrote
CONSOLE_OBJECTS = _LINES  # how the names of all objects with the console begin
_STAY = {EVALUATION, RAY}  # can be made again, or belong to processes
AT_THE_END = (TENSORBOARD, PROFILE, REPORT, EXPORT)  # large, or complete only then
TO_RESUME = (CONFIG_FILE, IDENTITY_FILE, BAD_SAMPLES_FILE, READMITTED_FILE, INITIAL, PSEUDO_LABELS, *APPENDED)
TO_READ = (*TO_RESUME, SUMMARY_FILE, EVALUATION_FILE, REPORT, EXPORT)
ERROR_LOGS = "error-rank-"  # the beginning of their names
OF_A_RANK = (ERROR_LOGS, HANG, NONFINITE, PROFILE)  # written on the nodes of other ranks, too
PART = re.compile(r"(.+)\.(\d{5,})-(\d{12,})")
_MOST_PARTS = 32  # of one file; then they are joined


@dataclass
class _Parts:
    """The part of a file that grows which is in the bucket."""

    names: list[str] = field(default_factory=list)
    last: int = 0  # the number of the newest part
    num_bytes: int = 0
    sha256: str = hashlib.sha256().hexdigest()

    @property
    def state(self) -> str:
        """The same for the same content alone."""
        return f"{self.num_bytes} {self.sha256}"


class Record:
    """The record of one run, in `folder` and in `store`. Not for several threads at once.

    Raises: StoreError from every method that reaches the store.
    """

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store = folder, store
        self._put: dict[str, tuple[int, int]] = {}  # size and time of change of files that are in the bucket
        self._parts: dict[str, _Parts] = {}
        self._merged: list[str] = []  # objects with ends and lines that are in this folder's files, too

    @staticmethod
    def of(folder: Path) -> Record | None:
        """None for an ordinary run folder."""
        store = store_of(folder)
        return None if store is None else Record(folder, store)

    def pull(self, names: Iterable[str]) -> None:
        """Make these files and folders of the staging folder those of the bucket.

        A file that grows is kept if it begins with the bucket's, or if nobody else has changed the bucket's since this folder
        sent or fetched it: its end could not be sent before a kill. Without a run in the bucket, the folder is left over from
        one that was deleted, and is emptied.
        """
        entries = self.store.entries()
        if CONFIG_FILE not in entries and self.folder.is_dir():
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = tuple(names)
        for name, entry in entries.items():
            if name.split("/")[0] in wanted and not name.startswith("."):
                self._pull_file(name, entry)
        for name in set(APPENDED) & set(wanted):
            self._pull_parts(name, entries)
        if ENDS_FILE in wanted:
            self._merge_ends(entries)
        if CONSOLE_FILE in wanted:
            self._merge_lines(entries)
        for path in self._files(wanted):
            name = self._name(path)
            if name not in entries and name not in APPENDED:
                path.unlink(missing_ok=True)
        self.note()

    def pull_ends(self) -> None:
        """Fetch what all nodes have reported about ends, and which hosts were readmitted; nothing of a run that is new."""
        entries = self.store.entries()
        if CONFIG_FILE not in entries:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if READMITTED_FILE in entries:
            self._pull_file(READMITTED_FILE, entries[READMITTED_FILE])
        self._pull_parts(ENDS_FILE, entries)
        self._merge_ends(entries)

    def put_end(self, line: bytes) -> None:
        """Send a line about an end from any node, whose file of ends nobody else sends."""
        self.store.put(f"{_ENDS}/{uuid.uuid4().hex}.json", line)

    def put_lines(self, text: str) -> None:
        """Send lines of the console from any process of the run, on any node."""
        self.store.put(f"{_LINES}/{time.time_ns():020d}-{uuid.uuid4().hex}.txt", text.encode())

    def delete_merged(self) -> None:
        """Delete the objects whose ends and lines have been sent with the files of this folder."""
        self.store.delete(self._merged)
        self._merged = []

    def push(self, names: Iterable[str] | None = None, *, without: Iterable[str] = ()) -> list[str]:
        """Send the changed files among these files and folders, by default all of the record. Returns their names."""
        sent = []
        for path in self._files(names):
            name = self._name(path)
            if name.split("/")[0] in without:
                continue
            try:
                status = path.stat()
                state = (status.st_size, status.st_mtime_ns)
                if self._put.get(name) == state:
                    continue
                if name in APPENDED:
                    self._push_parts(name, path)
                else:
                    self.store.put(name, path.read_bytes() if status.st_size < 1 << 20 else path)
            except FileNotFoundError:  # removed meanwhile
                continue
            self._put[name] = state
            sent.append(name)
        return sent

    def push_ends(self) -> None:
        """Send the ends of files that grow and the logs of ranks that broke, if this folder has the bucket's run."""
        identity = self.folder / IDENTITY_FILE
        if not identity.is_file() or self.store.get_or(IDENTITY_FILE) != identity.read_bytes():
            return
        entries = self.store.entries()
        for name in APPENDED:
            content, self._parts[name] = join(self.store, name, entries)
            path = self.folder / name
            if path.is_file() and path.read_bytes().startswith(content):  # otherwise another node has gone on
                self._push_parts(name, path)
        self.push((ERROR_LOGS, HANG))

    def note(self) -> None:
        """Take the files as they are now, but those that grow, for those of the bucket."""
        for path in self._files(None):
            if self._name(path) in APPENDED:
                continue
            status = path.stat()
            self._put[self._name(path)] = (status.st_size, status.st_mtime_ns)

    # ---- files ----

    def _files(self, names: Iterable[str] | None) -> Iterator[Path]:
        """Files of the record that are in the folder, config.yaml last: with it, the rest is there."""
        wanted = None if names is None else set(names)
        found = []
        for root, folders, files in os.walk(self.folder):
            top = Path(root) == self.folder
            folders[:] = [one for one in folders if not one.startswith(".") and (not top or self._is_part(one, wanted))]
            paths = [Path(root) / one for one in files if not one.startswith(".") and (not top or self._is_part(one, wanted))]
            found += [path for path in paths if path.is_file() and not path.is_symlink()]
        yield from sorted(found, key=lambda path: (path.name == CONFIG_FILE, path))

    def _is_part(self, name: str, wanted: set[str] | None) -> bool:
        known = name in FILES | FOLDERS | {TENSORBOARD} or name.startswith(PREFIXES)
        return known and name not in _ELSEWHERE | _STAY and (wanted is None or _named(name, wanted))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _pull_file(self, name: str, entry: Entry) -> None:
        path = self.folder / name
        stamp = f"{entry.num_bytes} {entry.changed}"
        noted = path.with_name(f".{path.name}.pulled")
        try:
            if path.stat().st_size == entry.num_bytes and noted.read_text() == f"{stamp} {path.stat().st_mtime_ns}":
                return
        except OSError:
            noted.unlink(missing_ok=True)
        try:
            data = self.store.get(name)
        except NoObjectError:  # deleted meanwhile
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        write_atomically(noted, f"{stamp} {path.stat().st_mtime_ns}".encode())

    # ---- files that grow ----

    def _pull_parts(self, name: str, entries: Mapping[str, Entry]) -> None:
        content, self._parts[name] = join(self.store, name, entries)
        path = self.folder / name
        here = path.read_bytes() if path.is_file() else b""
        if not content:
            return
        if not here.startswith(content):
            if here and self._known(name) == self._parts[name].state:
                return  # cut at a checkpoint and written again, and killed before it was sent
            write_atomically(path, content)
        self._know(name)

    def _known(self, name: str) -> str:
        """The state of the bucket's content that this folder has sent or fetched last."""
        try:
            return (self.folder / f".{name}.known").read_text()
        except (OSError, ValueError):
            return ""

    def _know(self, name: str) -> None:
        write_atomically(self.folder / f".{name}.known", self._parts[name].state.encode())

    def _merge_ends(self, entries: Mapping[str, Entry]) -> None:
        """Add the ends that are objects of their own, in the order of starts."""
        names = [name for name in entries if name.startswith(f"{_ENDS}/")]
        self._merged += names
        path = self.folder / ENDS_FILE
        here = path.read_bytes().splitlines() if path.is_file() else []
        lines = [self.store.get_or(name).strip() for name in names]
        if new := [line for line in dict.fromkeys(lines) if line and line not in here]:
            write_atomically(path, b"".join(line + b"\n" for line in sorted([*here, *new], key=_moment)))

    def _merge_lines(self, entries: Mapping[str, Entry]) -> None:
        """Add the lines of the console that are objects of their own, unless their process has left them here, too."""
        names = sorted(name for name in entries if is_line(name))
        self._merged += names
        path = self.folder / CONSOLE_FILE
        unsent = path.read_bytes()[self._parts[CONSOLE_FILE].num_bytes :] if path.is_file() else b""
        lines = [self.store.get_or(name) for name in names]
        if new := b"".join(text for text in lines if text not in unsent):
            with path.open("ab") as file:
                file.write(new)

    def _push_parts(self, name: str, path: Path) -> None:
        if name not in self._parts:
            self._parts[name] = join(self.store, name, self.store.entries())[1]
        parts, data = self._parts[name], path.read_bytes()
        if hashlib.sha256(data[: parts.num_bytes]).hexdigest() == parts.sha256 and len(data) >= parts.num_bytes:
            start = parts.num_bytes if len(parts.names) < _MOST_PARTS else 0
            if len(data) == parts.num_bytes:
                return
        else:
            start = 0  # it was cut or rewritten
        parts.last += 1
        new = f"{name}.{parts.last:05d}-{start:012d}"
        self.store.put(new, data[start:])
        old, parts.names = (parts.names, [new]) if start == 0 else ([], [*parts.names, new])
        parts.num_bytes, parts.sha256 = len(data), hashlib.sha256(data).hexdigest()
        self._know(name)
        self.store.delete(old)


def _moment(line: bytes) -> tuple[float, float]:
    """Start and time of a line about an end; a damaged line comes last."""
    content = parse_line(line + b"\n") or {}
    moments = [float(content[key]) for key in ("start", "time") if is_number(content.get(key))]
    return (moments[0], moments[1]) if len(moments) == 2 else (math.inf, math.inf)


def is_line(name: str) -> bool:
    """True for the name of an object with lines of the console that another process than rank 0 wrote."""
    return name.startswith(f"{_LINES}/")


def _named(name: str, wanted: set[str]) -> bool:
    return name in wanted or (ERROR_LOGS in wanted and name.startswith(ERROR_LOGS))


def join(store: Store, name: str, entries: Mapping[str, Entry]) -> tuple[bytes, _Parts]:
    """The content of a file that grows."""
    content, parts = b"", _Parts()
    matches = [match for entry in entries if (match := PART.fullmatch(entry)) and match[1] == name]
    for match in sorted(matches, key=lambda match: int(match[2])):
        data = store.get_or(match[0])
        content = content[: int(match[3])] + data
        parts.names.append(match[0])
        parts.last = int(match[2])
    parts.num_bytes, parts.sha256 = len(content), hashlib.sha256(content).hexdigest()
    return content, parts
