"""Watchdog: a thread of every rank that notices when the rank makes no progress and names the rank at fault.

Ranks run in lockstep, so if one hangs, all of them do. Each rank that still responds writes its activity and the stack of
every thread to RUN/hang. The lowest of them reads the reports of the others (hang_report.py) and prints a line. Then they exit
with a code that launchers treat as a failure. Nothing is communicated in normal operation.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TypeVar

from clae_dist.collectives import MARK
from clae_dist.errors import HUNG, STOPPED, Cause
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.mirror import add_to_console
from clae_dist.training.flight_recorder import dump
from clae_dist.training.guard import StopRequest, is_preemption
from clae_dist.training.hang_report import Phase, Report, culprit, read_report, stacks_by_ranks, verdict
from clae_dist.training.session import Session
from clae_dist.world import abandon

T = TypeVar("T")
GRACE_S = 5.0  # for the others to write what they do, and for storage that may be what hangs
PATIENT = ("starting", "evaluation", "checkpoint")  # may take four times as long
ENDING = "ending"
ENDING_S = 60.0  # at least: trackers have limits of their own
_HERE = os.sep + "clae_dist" + os.sep


class Watch:
    """`doing` sets the rank's activity. A thread checks that it changes within guard.hang_s, and that after a stop request the
    rank exits within guard.stop_within_s."""

    def __init__(self, session: Session, stop: StopRequest) -> None:
        config = session.config
        self._session = session
        self._config, self._world, self._stop = config, session.world, stop
        self._folder = session.folder.hang
        self._attempt, self._end = session.attempt, session.end
        self._hosts: list[str] = []
        self._now = Phase("starting", 0)
        self._main = threading.get_ident()
        self._over = threading.Event()
        hang_s = config.guard.hang_s
        self._poll_s = min([1.0, config.guard.stop_within_s / 10, *([hang_s / 10] if hang_s else [])])
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def meet(self) -> None:
        """Exchange the hosts of all ranks, to name ranks that no longer respond. Collective."""
        mine = (self._session.host, self._attempt.start)
        pairs = self._world.gather_objects(mine)
        self._hosts, self._attempt.start = [host for host, _ in pairs], pairs[0][1]

    def doing(self, what: str, step: int) -> None:
        """Set this rank's activity, in the step after `step` others. That is progress."""
        self._now, self._attempt.step = Phase(what, step), step

    @property
    def place(self) -> Phase:
        """This rank's activity; a new object after each progress."""
        return self._now

    @property
    def hosts(self) -> list[str]:
        """The hosts of all ranks with their processes, once they have met."""
        return self._hosts

    # ---- the thread ----

    def _run(self) -> None:
        quiet_s, seen, before = 0.0, self._now, time.monotonic()
        while not self._over.wait(self._poll_s):
            now = time.monotonic()
            # A machine that slept, or a job that its scheduler suspended, has not been awake to get any further.
            awake_s, before = min(now - before, 3 * self._poll_s), now
            quiet_s = quiet_s + awake_s if self._now is seen else 0.0
            seen = self._now
            limit_s = self.limit_s(seen.doing)
            if limit_s and (quiet_s > limit_s or (quiet_s > limit_s / 2 and self._others_report(limit_s))):
                self._give_up(seen, quiet_s)
            if self._stop.overdue(self._config.guard.stop_within_s):
                self._leave_unsaved(seen)

    def limit_s(self, doing: str) -> float:
        """Seconds without progress after which this start is ended; 0: no limit."""
        limit_s = self._config.guard.limit_s(patient=doing in (*PATIENT, ENDING))
        return max(limit_s, ENDING_S) if limit_s and doing == ENDING else limit_s

    def _others_report(self, limit_s: float) -> bool:
        """True if another rank with a shorter limit has reported a hang."""

        def newest() -> float:
            return max((path.stat().st_mtime for path in self._folder.glob("rank-*.json")), default=0.0)

        return time.time() - (within(GRACE_S, newest) or 0.0) < limit_s / 2

    def _give_up(self, place: Phase, quiet_s: float) -> None:
        frames = sys._current_frames()
        main = frames.get(self._main)
        report = Report(
            rank=self._world.rank,
            host=self._session.host,
            doing=place.doing,
            step=place.step,
            quiet_s=round(quiet_s, 1),
            where=_own_place(main),
            stack="".join(traceback.format_stack(main)),
        )
        text = _all_threads(frames, self._main)
        others = within(GRACE_S, lambda: self._exchange(report, text)) or [report]
        if self._world.size > 1:
            dump(self._config.folder, self._world.rank)
        if report.rank == min(other.rank for other in others):
            line = verdict(others, self._world.size, self._hosts, self._config.folder)
            within(GRACE_S, lambda: print(f"clae: {line}", file=sys.stderr, flush=True))
            within(GRACE_S, lambda: self._record_hang(others, line))
            within(GRACE_S, lambda: self._log(f"{stacks_by_ranks(others)}\n{line}\n"))
        abandon(HUNG)

    def _record_hang(self, reports: list[Report], line: str) -> None:
        rank, host = culprit(reports, self._world.size, self._hosts)
        self._attempt.end(self._config.folder, rank, self._world.size, "no progress", HUNG, line, host=host)

    def _exchange(self, report: Report, text: str) -> list[Report]:
        """Write this rank's report, and read those that others write within the grace period."""
        deadline = time.monotonic() + GRACE_S * 0.8
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{report.rank:05d}"
        (self._folder / f"{name}.txt").write_text(text)
        partial = self._folder / f"{name}.partial"
        partial.write_text(json.dumps(asdict(report)))
        mine = self._folder / f"{name}.json"
        partial.replace(mine)
        since = mine.stat().st_mtime - max(GRACE_S, self._config.guard.hang_s / 2)  # by the storage's clock
        while True:
            recent = [path for path in sorted(self._folder.glob("rank-*.json")) if path.stat().st_mtime >= since]
            if len(recent) == self._world.size or time.monotonic() > deadline:
                return [found for path in recent if (found := read_report(path)) is not None]
            time.sleep(0.1)

    def _log(self, text: str) -> None:
        add_to_console(self._config.folder, text)

    def _leave_unsaved(self, place: Phase) -> None:
        newest = "" if place.doing == ENDING else within(GRACE_S, lambda: _newest(self._config.folder))
        how = "with everything saved" if place.doing == ENDING else "without saving"
        after = "resumes from there" if newest is None or place.doing == ENDING else f"resumes from {newest}"
        if newest == "" and place.doing != ENDING:
            after = "starts again from the beginning, as there is no checkpoint yet"
        line = (
            f"clae: rank {self._world.rank} was asked to stop ({self._stop.reason}) and is still at {place}, "
            f"{self._config.guard.stop_within_s:g} s later (guard.stop_within_s); it leaves {how}, and the same command "
            f"{after}.\n"
        )
        within(GRACE_S, lambda: print(line, end="", file=sys.stderr, flush=True))
        within(GRACE_S, lambda: self._log(line))
        cause: Cause = "preemption" if is_preemption(self._stop.reason) else "stopped"
        within(GRACE_S, lambda: self._end(cause, STOPPED, line.removeprefix("clae: ")))
        abandon(STOPPED)


def _newest(run_dir: Path) -> str:
    """The name of the newest checkpoint; "" without one."""
    return next((path.name for path in RunFolder(run_dir).find_checkpoints()), "")


def _own_place(frame: FrameType | None) -> str:
    """The innermost function of this package that waits or works, as "flags_anywhere (world.py:132)"."""
    while frame is not None and (_HERE not in frame.f_code.co_filename or frame.f_code.co_name == MARK):
        frame = frame.f_back
    if frame is None:
        return "?"
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename.rpartition(_HERE)[2]}:{frame.f_lineno})"


def _all_threads(frames: dict[int, FrameType], main: int) -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    ordered = sorted(frames.items(), key=lambda item: item[0] != main)
    return "\n".join(f"thread {names.get(i, i)}\n{''.join(traceback.format_stack(frame))}" for i, frame in ordered)


def within(seconds: float, action: Callable[[], T]) -> T | None:
    """The result of `action`; None if it fails or takes longer, since storage may be the cause of the hang."""
    found: list[T] = []

    def act() -> None:
        try:
            found.append(action())
        except (OSError, ValueError, TypeError) as error:
            with suppress(OSError, ValueError):
                sys.stderr.write(f"clae: {error}\n")

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
