"""Accounting of time: seconds by name, and of them those in which this rank waited for others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

WAITING = "waiting"


class Clock:
    """Seconds by name. On a GPU, measured by events: only `read` and `stopped` may synchronise.

    `read` and `lap` are two counts of the same seconds, each since its own last call.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._totals: dict[str, float] = {}
        self._events: list[tuple[tuple[str, ...], torch.cuda.Event, torch.cuda.Event]] = []
        self._inside: tuple[str, ...] = ()
        self._paused_s = 0.0
        start = time.perf_counter()
        self._at_read: tuple[float, dict[str, float]] = start, {}
        self._at_lap: tuple[float, dict[str, float]] = start, {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time inside under `name`, and not under the name that it is nested in. Traces have the name, too."""
        with record_function(f"clae: {name}"), self._counted(name):
            yield

    def waiting(self) -> _Waiting:
        """Context of a wait for other ranks, as `timed`; there are hundreds in a step, so it costs a microsecond."""
        return _Waiting(self)

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        outside = self._inside
        self._inside = (*outside, name)
        begin = self._stamp()
        try:
            yield
            self._count(self._inside, begin)
        finally:
            self._inside = outside

    def _stamp(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _count(self, names: tuple[str, ...], begin: float | torch.cuda.Event) -> None:
        end = self._stamp()
        if isinstance(begin, float) and isinstance(end, float):
            self._add(names, end - begin)
        elif isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._events.append((names, begin, end))

    def _add(self, names: tuple[str, ...], seconds: float) -> None:
        *outer, name = names
        self._totals[name] = self._totals.get(name, 0.0) + seconds
        if outer:
            self._totals[outer[-1]] = self._totals.get(outer[-1], 0.0) - seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds in all and by name since the last call. Waits for a GPU."""
        now = self._now() - self._paused_s
        self._take_events()
        seconds, spent = _since(self._at_read, now, self._totals)
        self._at_read = now, dict(self._totals)
        return seconds, spent

    def lap(self) -> tuple[float, dict[str, float]]:
        """As `read`, since the last lap, without waiting for a GPU: what it has not finished counts in a later lap."""
        now = time.perf_counter() - self._paused_s
        self._take_events()
        seconds, spent = _since(self._at_lap, now, self._totals)
        self._at_lap = now, dict(self._totals)
        return seconds, spent

    def _take_events(self) -> None:
        done = 0
        for names, begin, end in self._events:
            if not end.query():
                break
            self._add(names, begin.elapsed_time(end) / 1000)
            done += 1
        del self._events[:done]

    @contextmanager
    def stopped(self, *, synchronise: bool = True) -> Iterator[None]:
        """Context (evaluation, checkpoints) whose time is not counted: of the host and a GPU, or of the host alone."""
        now = self._now if synchronise else time.perf_counter
        start, totals, num_events = now(), dict(self._totals), len(self._events)
        yield
        self._paused_s += now() - start
        self._totals = totals
        del self._events[num_events:]


class _Waiting:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        clock = self._clock
        self._outside = clock._inside
        clock._inside = (*self._outside, WAITING)
        self._begin = clock._stamp()

    def __exit__(self, *error: object) -> None:
        self._clock._count(self._clock._inside, self._begin)
        self._clock._inside = self._outside


def _since(before: tuple[float, dict[str, float]], now: float, totals: dict[str, float]) -> tuple[float, dict[str, float]]:
    start, at_start = before
    return now - start, {name: value - at_start.get(name, 0.0) for name, value in totals.items()}
