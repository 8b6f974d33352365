"""Leaving in good order: signals and stop files become a question that every step asks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from clae_dist.runs.folder import STOP_FILE


class StopRequest:
    """Whether this process was asked to stop: by SIGINT or SIGTERM, or by a STOP file in the run folder."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP_FILE
        self.reason = ""

    def made(self) -> bool:
        if not self.reason and self._file.exists():
            self.reason = "the launcher asked"
        return bool(self.reason)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self.reason = signal.Signals(number).name


@contextmanager
def listen_for_stop(run_dir: Path) -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM only set the request. Outside of the main thread signals are the launcher's affair."""
    request = StopRequest(run_dir)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
