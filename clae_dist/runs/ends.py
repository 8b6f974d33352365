"""Ends of a run's starts, with their causes: RUN/ends.jsonl, one JSON object per line.

Each start of a run ends once, but several ranks may report it: the one that broke, and those that lost their connection to
it. `read_ends` has one end per start, that of the rank at fault.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from clae_dist.causes import PEER_ADDRESS, PEER_LEFT
from clae_dist.errors import CAUSES, FAILED, Cause
from clae_dist.object_store import store_of
from clae_dist.reading import (
    Check,
    MissingError,
    ReadError,
    expect,
    is_count,
    is_number,
    is_text,
    open_regular,
    or_none,
    parse_line,
)
from clae_dist.redact import redact_text
from clae_dist.runs.folder import RunFolder, step_of
from clae_dist.runs.record import Record

MAX_TEXT = 400  # characters
_MOST_ALIKE = 4  # lines about a lost connection for each start: a thousand ranks lose it at once
_SEND_S = 10.0  # at most, to object storage
_TAIL_BYTES = 256 << 10
_DETERMINISTIC: tuple[Cause, ...] = ("code", "memory")
_OF_A_HOST: tuple[Cause, ...] = ("host", "memory", "no progress")  # a rank that reports a lost link is not always the cause
_FINE: tuple[Cause, ...] = ("finished", "stopped", "preemption")


@dataclass(frozen=True)
class End:
    """The end of a start, as one rank or the launcher reports it. Times are in seconds since 1970."""

    start: float  # when the start began, by rank 0's clock: the same in all reports about it
    time: float
    cause: Cause
    rank: int  # at fault, or that reports an end of all ranks
    size: int
    host: str  # of that rank; "" if it is not known
    step: int  # steps taken
    code: int  # the exit code if the run is not started again
    text: str  # one line
    digest: str = ""  # of the traceback, if any
    checkpoint: int | None = None  # the step of the newest checkpoint
    peer: str = ""  # the host whose connection was lost, where the error names its address

    @property
    def is_failure(self) -> bool:
        return self.cause not in _FINE

    def describe(self) -> str:
        """The end in a few words: "memory (rank 1 on node-3, after step 17): …"."""
        where = f"rank {self.rank}" + (f" on {self.host}" if self.host else "") if self.is_failure else ""
        place = ", ".join(part for part in (where, f"after step {self.step}") if part)
        return f"{self.cause} ({place})" + (f": {self.text}" if self.text else "")


_FIELDS: dict[str, Check] = {
    "start": is_number,
    "time": is_number,
    "cause": lambda value: value in CAUSES,
    **dict.fromkeys(("rank", "size", "step", "code"), is_count),
    **dict.fromkeys(("host", "text", "digest"), is_text),
    "checkpoint": or_none(is_count),
}
_OPTIONAL: dict[str, Check] = {"peer": is_text}


@dataclass
class Attempt:
    """One start of a run, as a rank knows it so far."""

    start: float = 0.0
    step: int = 0
    total: int = 0  # steps of the run
    slow: str = ""  # the slow rank, with host and part, if one was found
    holds_lease: bool = False
    opened: bool = False  # the folder is known to be this run's
    trained: bool = False
    addresses: dict[str, str] = field(default_factory=dict)  # of all hosts, and their names

    def end(
        self,
        run_dir: Path,
        rank: int,
        size: int,
        cause: Cause,
        code: int,
        text: str,
        digest: str = "",
        host: str | None = None,
    ) -> None:
        """Record that this start has ended, on this host unless another is named.

        A disk without room is no reason to fail here.
        """
        end = End(
            start=self.start or time.time(),
            time=time.time(),
            cause=cause,
            rank=rank,
            size=size,
            host=platform.node() if host is None else host,
            step=self.step,
            code=code,
            text=text,
            digest=digest,
            checkpoint=newest_step(run_dir),
            peer=self._peer(text) if cause == "network" else "",
        )
        with suppress(OSError):
            if record_end(run_dir, end) and (store := store_of(run_dir, _SEND_S)):
                Record(run_dir, store).put_end(_line(end))

    def _peer(self, text: str) -> str:
        """The host that an error of gloo or NCCL means: "Read error [10.0.0.2]:4711: Connection reset by peer"."""
        match = PEER_ADDRESS.search(text)
        address = (match[1] or match["nccl"]) if match else ""
        return self.addresses.get(address, address if address in self.addresses.values() else "")


def newest_step(run_dir: Path) -> int | None:
    """The step of the newest committed checkpoint."""
    return next((step_of(path) for path in RunFolder(run_dir).find_checkpoints()), None)


def record_end(run_dir: Path, end: End) -> bool:
    """Append an end, as one write; False if there are enough like it. Raises OSError."""
    if end.cause == "network" and sum(one.start == end.start for one in _read(run_dir)) >= _MOST_ALIKE:
        return False
    line = _line(end)
    with RunFolder(run_dir).ends_file.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = size > 0 and file.read(1) != b"\n"  # cut off by a kill
        file.write((b"\n" if torn else b"") + line)
    return True


def _line(end: End) -> bytes:
    text = " ".join(redact_text(end.text).split())
    text = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
    return json.dumps(asdict(replace(end, text=text))).encode() + b"\n"


def _nothing(_: str) -> None: ...


def read_ends(run_dir: Path, say: Callable[[str], None] = _nothing) -> list[End]:
    """One end per start, oldest first; damaged lines are skipped. Of a long file, only the newest ends are read."""
    starts: dict[float, list[End]] = {}
    for end in _read(run_dir, say):
        starts.setdefault(end.start, []).append(end)
    return [_at_fault(reports) for reports in starts.values()]


def _read(run_dir: Path, say: Callable[[str], None] = _nothing) -> list[End]:
    path = RunFolder(run_dir).ends_file
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).splitlines(keepends=True)[int(size > _TAIL_BYTES) :]
    except MissingError:
        return []
    except (OSError, ReadError) as error:
        say(f"{path} cannot be read ({error}) and is ignored.")
        return []
    found = [None if (content := parse_line(line)) is None else _end_of(content) for line in lines]
    ends = [end for end in found if end is not None]
    if ignored := len(found) - len(ends):
        say(f"{path}: {ignored} lines that are cut off or damaged are ignored.")
    return ends


def _end_of(content: dict[str, Any]) -> End | None:
    try:
        expect(content, _FIELDS, _OPTIONAL)
    except ReadError:
        return None
    return End(**{key: content[key] for key in (*_FIELDS, *_OPTIONAL) if key in content})


def _at_fault(reports: Sequence[End]) -> End:
    """The report of the rank at fault: a rank that lost its connection is one that another has left, as a rule."""
    others = [end for end in reports if end.cause != "network"]
    if others:
        return min(others, key=lambda end: (end.cause in _FINE, end.time))
    # A rank reports before it closes its own connections: the first line is of one that lost the rank at fault itself.
    first = reports[0]
    if PEER_LEFT.search(first.text):  # and it left without a word, or its report would be here
        return replace(first, cause="host", host=first.peer, code=FAILED, text=f"another rank vanished: {first.text}")
    return first


def repeated_crash(ends: Sequence[End]) -> End | None:
    """The last end, if it is the same crash as the one before it, at the same code and without a new checkpoint between."""
    if len(ends) < 2:
        return None
    before, last = ends[-2:]
    same = (before.cause, before.digest, before.checkpoint) == (last.cause, last.digest, last.checkpoint)
    return last if same and last.digest and last.cause in _DETERMINISTIC else None


def host_at_fault(ends: Sequence[End]) -> str:
    """The host of the last two ends, if both are failures of that host without a new checkpoint between; else ""."""
    if len(ends) < 2:
        return ""
    before, last = ends[-2:]
    same = (before.host, before.checkpoint) == (last.host, last.checkpoint)
    return last.host if same and before.cause in _OF_A_HOST and last.cause in _OF_A_HOST else ""
