"""Accounting of time: seconds by name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds by name since the last `read`. On a GPU, measured by events: only `read` and `stopped` synchronise."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spent: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._since = time.perf_counter()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        if self._device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        start = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - start)

    def _add(self, name: str, seconds: float) -> None:
        self._spent[name] = self._spent.get(name, 0.0) + seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds in all and by name since the last call."""
        now = self._now()
        for name, begin, end in self._events:
            self._add(name, begin.elapsed_time(end) / 1000)
        self._events.clear()
        total, spent = now - self._since, self._spent
        self._since, self._spent = now, {}
        return total, spent

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Context (evaluation, checkpoints) whose time is not counted."""
        start = self._now()
        yield
        self._since += self._now() - start
