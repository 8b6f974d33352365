"""Goodput: where the wall time of a run went, over all its starts, from RUN/goodput.jsonl.

Each start appends a line when it begins, one when it has resumed, and further ones with the seconds spent on each kind of work
so far. A kill -9 loses at most the time since the last line. Steps that a later start repeats count as lost.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from clae_dist.reading import ReadError, is_count, is_number, json_lines
from clae_dist.runs.folder import RunFolder

Kind = Literal["training", "starting", "data", "checkpoint", "evaluation", "lost", "idle"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MEANING: dict[Kind, str] = {
    "training": "steps whose result was kept",
    "starting": "opening shards, building the model, loading a checkpoint, the first batch and step",
    "data": "waiting for batches, on the rank that waited longest",
    "checkpoint": "waiting for a checkpoint",
    "evaluation": "kNN during training",
    "lost": "work after the checkpoint from which a later start resumed, which was repeated",
    "idle": "between one start and the next: hung, killed, waiting in a queue",
}
_EVENTS = ("start", "resume", "mark", "end")
_EVERY_S = 30.0  # between lines


@dataclass(frozen=True)
class Goodput:
    """Seconds of each kind since the first start. They add up to the wall time."""

    spent: dict[Kind, float]
    starts: int

    @property
    def wall_s(self) -> float:
        return sum(self.spent.values())

    @property
    def shares(self) -> dict[Kind, float]:
        """In percent of the wall time."""
        return {kind: 100 * seconds / max(self.wall_s, 1e-9) for kind, seconds in self.spent.items()}

    def metrics(self) -> dict[str, float]:
        """Metrics for trackers, in percent: `goodput`, and the shares of everything except training."""
        return {"goodput": self.shares["training"], **{f"goodput_{kind}_share": self.shares[kind] for kind in KINDS[1:]}}

    def as_dict(self) -> dict[str, Any]:
        """For summary.json."""
        return {"wall_s": self.wall_s, "starts": self.starts, **{f"{kind}_share": self.shares[kind] for kind in KINDS}}

    def describe(self) -> str:
        """A line for the console."""
        parts = ", ".join(f"{kind} {self.shares[kind]:.1f} %" for kind in KINDS[1:] if self.spent[kind] > 0)
        wall = f"{self.wall_s / 3600:.2f} h" if self.wall_s >= 3600 else f"{self.wall_s:.0f} s"
        return f"goodput {self.shares['training']:.1f} % of {wall} in {self.starts} start{'s' * (self.starts != 1)}" + (
            f" ({parts})" if parts else ""
        )


class Ledger:
    """Time accounting of one start, on rank 0. `switch` ends one kind of work and begins another.

    Nothing is written before `resumed`: until then the folder may still turn out to belong to another run.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.time, write: bool = True) -> None:
        self._folder, self._clock, self._write = run_dir, clock, write
        self._spent: dict[Kind, float] = {}
        self._kind: Kind = "starting"
        self._begun = self._since = self._written = clock()
        self._step = 0
        self._earlier = Goodput(
            dict.fromkeys(KINDS, 0.0), 1
        )  # all earlier starts, with the steps that this one repeats as lost

    def resumed(self, step: int, say: Callable[[str], None] = lambda _: None) -> None:
        """This start resumes from the checkpoint of `step`; all later work was lost."""
        self._step = step
        begin = {"event": "start", "at": self._begun}
        # Nothing of this start yet, except for the step from which it repeats.
        earlier = [
            *(read_lines(self._folder, say) if self._write else []),
            begin,
            {"event": "resume", "at": self._begun, "step": step},
        ]
        self._earlier = account(earlier)
        self._append(begin)
        self._line("resume")

    def switch(self, kind: Kind, step: int) -> None:
        """Account the time from now on to `kind`, after `step` steps."""
        if kind != self._kind or step != self._step:
            before, self._step = self._kind, step
            self._take()
            self._kind = kind
            # A later start counts repeated work from the line at a checkpoint.
            if (kind != before and "checkpoint" in (before, kind)) or self._since - self._written > _EVERY_S:
                self._line("mark")

    def move(self, source: Kind, to: Kind, seconds: float) -> None:
        """Account seconds of `source` to `to`: this rank waited for a rank that waited for data."""
        seconds = max(0.0, min(seconds, self._spent.get(source, 0.0)))
        self._spent[source] = self._spent.get(source, 0.0) - seconds
        self._spent[to] = self._spent.get(to, 0.0) + seconds

    def close(self) -> None:
        """Write the last line of this start."""
        self._line("end")

    def so_far(self) -> Goodput:
        """The goodput of the run, including this start."""
        self._take()
        total = {kind: self._earlier.spent[kind] + self._spent.get(kind, 0.0) for kind in KINDS}
        return Goodput(total, self._earlier.starts)

    def snapshot(self) -> Goodput:
        """As `so_far`, for another thread: it changes nothing."""
        spent, kind, since = dict(self._spent), self._kind, self._since
        spent[kind] = spent.get(kind, 0.0) + max(0.0, self._clock() - since)
        return Goodput({name: self._earlier.spent[name] + spent.get(name, 0.0) for name in KINDS}, self._earlier.starts)

    def _take(self) -> None:
        now = max(self._since, self._clock())  # a clock may be set back
        self._spent[self._kind] = self._spent.get(self._kind, 0.0) + now - self._since
        self._since = now

    def _line(self, event: str) -> None:
        self._take()
        self._written = self._since
        self._append({"event": event, "at": self._since, "step": self._step, "spent": dict(self._spent)})

    def _append(self, line: dict[str, Any]) -> None:
        if not self._write:
            return
        # A full disk is reported by checkpoints and metrics; it must not end the run here.
        with suppress(OSError), RunFolder(self._folder).goodput_file.open("a+b") as file:
            torn = file.seek(0, os.SEEK_END) > 0 and _last_byte(file) != b"\n"  # cut off by a kill
            file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    byte: bytes = file.read(1)
    return byte


def read_lines(run_dir: Path, say: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """The valid lines of a run's goodput.jsonl, [] without one. Damaged lines are skipped and reported in one line."""
    path = RunFolder(run_dir).goodput_file
    usable, ignored = [], 0
    try:
        for line in json_lines(path):
            if line is not None and _is_usable(line):
                usable.append(line)
            else:
                ignored += 1
    except ReadError as error:
        say(f"{path} cannot be read ({error}): it is ignored, and the goodput is counted from now on.")
        return usable
    if ignored:
        say(f"{path}: {ignored} lines that are cut off or damaged are ignored; the goodput covers less time.")
    return usable


def _is_usable(line: dict[str, Any]) -> bool:
    spent, step = line.get("spent", {}), line.get("step", 0)
    return (
        line.get("event") in _EVENTS
        and _is_time(line.get("at"))
        and is_count(step)
        and isinstance(spent, dict)
        and ("step" in line or line["event"] == "start")
        and all(kind in KINDS and _is_time(seconds) for kind, seconds in spent.items())
    )


def _is_time(value: Any) -> bool:
    """Seconds, of a run or since 1970."""
    return is_number(value) and 0 <= value < 1e11


def account(lines: Sequence[dict[str, Any]]) -> Goodput:
    """The goodput that a run's lines add up to."""
    starts: list[list[dict[str, Any]]] = []
    for line in lines:
        if line["event"] == "start" or not starts:
            starts.append([])
        starts[-1].append(line)
    total: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    kept_up_to = float("inf")  # later steps were repeated by a later start
    later: float | None = None  # when the next start began
    for start in reversed(starts):
        if later is not None:
            total["idle"] += max(0.0, later - start[-1]["at"])
        _add(start, kept_up_to, total)
        kept_up_to = min([kept_up_to, *(line["step"] for line in start if line["event"] == "resume")])
        later = start[0]["at"]
    return Goodput(total, len(starts))


def _add(start: Sequence[dict[str, Any]], kept_up_to: float, total: dict[Kind, float]) -> None:
    """Add the seconds between the lines of a start; those of repeated steps count as lost."""
    before: dict[str, Any] = {"step": next((line["step"] for line in start if "step" in line), 0), "spent": {}}
    for line in start:
        if "spent" not in line:
            continue
        first, last = before["step"], line["step"]
        lost = 0.0 if last <= kept_up_to else min(1.0, (last - kept_up_to) / max(1, last - first))
        for kind, seconds in line["spent"].items():
            delta = seconds - before["spent"].get(kind, 0.0)
            again = 0.0 if kind == "starting" else lost
            total[kind] += delta * (1 - again)
            total["lost"] += delta * again
        before = line
