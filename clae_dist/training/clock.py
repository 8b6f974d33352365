"""Where the time goes: seconds by name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds spent, by name, since the last `read`. On a GPU every reading waits for it, as every step does anyway."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spent: dict[str, float] = {}
        self._since = time.perf_counter()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spent[name] = self._spent.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds in all and by name since the last call."""
        now = self._now()
        total, spent = now - self._since, self._spent
        self._since, self._spent = now, {}
        return total, spent

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside (evaluation, checkpoints) does not count."""
        start = self._now()
        yield
        self._since += self._now() - start
