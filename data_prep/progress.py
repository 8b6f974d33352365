"""One line of progress on stderr: how much is done, how fast, how long it will take."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """On a terminal one line that is rewritten; elsewhere a line every few seconds. `unit` counts as one of what is shown."""

    def __init__(
        self, total: int, already_done: int = 0, stream: TextIO | None = None, *, name: str = "images", unit: float = 1
    ) -> None:
        self._total, self._done, self._at_start = total, already_done, already_done
        self._name, self._unit = name, unit
        self._has_printed = False
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

    def close_if_seen(self) -> None:
        """As `close`, but what was too short for a line gets none."""
        if self._has_printed:
            self.close()

    def _print(self, end: str) -> None:
        self._last = now = time.monotonic()
        rate = (self._done - self._at_start) / max(now - self._started, 1e-3)
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        speed = f"{rate / self._unit:.0f} {self._name}/s, {_duration(left)} left" if rate else "starting"
        text = f"{self._done / self._unit:.0f} of {self._total / self._unit:.0f} {self._name}, {speed}"
        start, fill = ("\r", "\x1b[K") if self._is_terminal else ("", "")
        self._stream.write(f"{start}{text}{fill}{end}")
        self._stream.flush()
        self._has_printed = True


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
