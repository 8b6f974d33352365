"""Stop requests by signals and stop files, which every step checks."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from clae_dist.runs.folder import RunFolder

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ONE_REQUEST_S = 2.0
_PREEMPTIONS = ("SIGTERM", "SIGUSR1")  # of a scheduler
TAKEN_AWAY = "will be taken away"  # how a launcher's request ends that leaves a host


def _nothing() -> int:
    return 0


# The signal that a launcher was sent, where it handed on another one to its ranks (they ignore a terminal's Ctrl-C); 0: none.
handed_on: Callable[[], int] = _nothing


def is_preemption(reason: str) -> bool:
    """True for the reason of a request that came from a scheduler, not from a user at a terminal."""
    return reason in _PREEMPTIONS or reason.endswith(TAKEN_AWAY)


class StopRequest:
    """A request to stop, by a signal or by a STOP file in the run folder."""

    def __init__(self, run_dir: Path) -> None:
        self._file = RunFolder(run_dir).stop_file
        self.reason = ""
        self._asked_at = 0.0

    def made(self) -> bool:
        if not self.reason and self._file.exists():
            self.make(self._file.read_text().strip() or "the launcher asked")
        return bool(self.reason)

    def make(self, reason: str) -> None:
        """Record the request and its time."""
        if not self.reason:
            self._asked_at, self.reason = time.monotonic(), reason

    @property
    def waited_s(self) -> float:
        """Since the request."""
        return time.monotonic() - self._asked_at if self.reason else 0.0

    def overdue(self, within_s: float) -> bool:
        return bool(self.reason) and self.waited_s > within_s

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        # A terminal and a launcher may both send what a user asked for once; asked again, it means at once.
        if self.reason and number == signal.SIGINT and self.waited_s > _ONE_REQUEST_S:
            raise KeyboardInterrupt
        self.make("Ctrl-C" if (handed_on() or number) == signal.SIGINT else signal.Signals(handed_on() or number).name)


@contextmanager
def listen_for_stop(run_dir: Path) -> Iterator[StopRequest]:
    """Context in which SIGINT, SIGTERM and SIGUSR1 (a scheduler's notice) only set the request.

    SIGINT and SIGTERM stay ignored if this process ignores them. Outside of the main thread, the launcher handles signals.
    """
    request = StopRequest(run_dir)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # Launchers start ranks with SIGUSR1 ignored, so that it does not kill ranks that have no handler yet.
    heard = [n for n in STOP_SIGNALS if n == signal.SIGUSR1 or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request.on_signal) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
