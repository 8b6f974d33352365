"""Leaving in good order: signals and stop files become a question that every step asks."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from clae_dist.runs.folder import STOP_FILE

_ONE_REQUEST_S = 2.0


class StopRequest:
    """Whether this process was asked to stop: by SIGINT, SIGTERM or SIGUSR1, or by a STOP file in the run folder."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP_FILE
        self.reason = ""
        self._asked_at = 0.0

    def made(self) -> bool:
        if not self.reason and self._file.exists():
            self.reason = self._file.read_text().strip() or "the launcher asked"
        return bool(self.reason)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # A terminal and a launcher may both send what a user asked for once; asked again, it means at once.
        if self.reason and number == signal.SIGINT and now - self._asked_at > _ONE_REQUEST_S:
            raise KeyboardInterrupt
        if not self.reason:
            self.reason, self._asked_at = signal.Signals(number).name, now


@contextmanager
def listen_for_stop(run_dir: Path) -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM only set the request, unless this process ignores them; SIGUSR1, a scheduler's notice, always.

    Outside of the main thread signals are the launcher's affair.
    """
    request = StopRequest(run_dir)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    # Launchers let ranks start with SIGUSR1 ignored, lest it kill those that do not listen yet.
    before = {number: signal.signal(number, request.on_signal) for number in (*heard, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
