"""Accounting of time: seconds by name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function


class Clock:
    """Seconds by name since the last `read`. On a GPU, measured by events: only `read` and `stopped` may synchronise."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spent: dict[str, float] = {}
        self._events: list[tuple[tuple[str, ...], torch.cuda.Event, torch.cuda.Event]] = []
        self._inside: tuple[str, ...] = ()
        self._since = time.perf_counter()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time inside under `name`, and not under the name that it is nested in. Traces have the name, too."""
        outside = self._inside
        self._inside = (*outside, name)
        try:
            with record_function(f"clae: {name}"):
                if self._device.type == "cuda":
                    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    begin.record()
                    yield
                    end.record()
                    self._events.append((self._inside, begin, end))
                else:
                    start = time.perf_counter()
                    yield
                    self._add(self._inside, time.perf_counter() - start)
        finally:
            self._inside = outside

    def _add(self, names: tuple[str, ...], seconds: float) -> None:
        *outer, name = names
        self._spent[name] = self._spent.get(name, 0.0) + seconds
        if outer:
            self._spent[outer[-1]] = self._spent.get(outer[-1], 0.0) - seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds in all and by name since the last call."""
        now = self._now()
        for names, begin, end in self._events:
            self._add(names, begin.elapsed_time(end) / 1000)
        self._events.clear()
        total, spent = now - self._since, self._spent
        self._since, self._spent = now, {}
        return total, spent

    @contextmanager
    def stopped(self, *, synchronise: bool = True) -> Iterator[None]:
        """Context (evaluation, checkpoints) whose time is not counted: of the host and a GPU, or of the host alone."""
        now = self._now if synchronise else time.perf_counter
        start = now()
        yield
        self._since += now() - start
