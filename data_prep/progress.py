"""One line of progress on stderr: images done, images/s, time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """On a terminal one line that is rewritten; elsewhere a line every few seconds."""

    def __init__(self, total: int, already_done: int = 0, stream: TextIO | None = None) -> None:
        self._total, self._done, self._at_start = total, already_done, already_done
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._started = self._last = time.monotonic()

    def add(self, count: int) -> None:
        """`count` more images are done; prints when it is time to."""
        self._done += count
        if time.monotonic() - self._last >= (0.2 if self._is_terminal else 5.0):
            self._print(end="" if self._is_terminal else "\n")

    def close(self) -> None:
        """The last line, with the final numbers."""
        self._print(end="\n")

    def _print(self, end: str) -> None:
        self._last = now = time.monotonic()
        rate = (self._done - self._at_start) / max(now - self._started, 1e-3)
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        speed = f"{rate:.0f} images/s, {_duration(left)} left" if rate else "starting"
        text = f"{self._done} of {self._total} images, {speed}"
        start, fill = ("\r", "\x1b[K") if self._is_terminal else ("", "")
        self._stream.write(f"{start}{text}{fill}{end}")
        self._stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
