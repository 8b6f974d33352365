"""Progress of long work: how much is done, how fast, and how long the rest will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line every five seconds.

    Args:
        total: the amount of work, in the units of `add`.
        done: the part of it that was done before.
        name: the unit that is shown, such as images; `scale` of `add`'s units make one of it.
        label: the work, in front of each line.
        say: where lines go instead of `stream` (default stderr).
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        name: str = "images",
        scale: float = 1,
        label: str = "",
        say: Callable[[str], None] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._total, self._done, self._done_before = total, done, done
        self._name, self._scale, self._label = name, scale, label
        self._say, self._stream = say, stream or sys.stderr
        self._is_terminal = say is None and self._stream.isatty()
        self._has_printed = self._is_complete = False  # is the last line printed, with all the work?
        self._started = self._printed = time.monotonic()

    def add(self, count: int) -> None:
        """Count finished work; print if a line is due. `add(0)` while waiting keeps the lines coming."""
        self._done += count
        if time.monotonic() - self._printed >= (0.2 if self._is_terminal else 5.0):
            self._print(end="" if self._is_terminal else "\n")

    def close(self, only_if_printed: bool = False) -> None:
        """Print the last line, with the final numbers; `only_if_printed` skips it for work that was too short for a line."""
        if (self._has_printed or not only_if_printed) and not self._is_complete:
            self._print(end="\n")

    def _print(self, end: str) -> None:
        self._printed, self._has_printed = time.monotonic(), True
        self._is_complete = self._done >= self._total and not self._is_terminal
        if self._say is not None:
            self._say(self._text())
            return
        start, clear = ("\r", "\x1b[K") if self._is_terminal else ("", "")
        self._stream.write(f"{start}{self._text()}{clear}{end}")
        self._stream.flush()

    def _text(self) -> str:
        passed = max(self._printed - self._started, 1e-3)
        rate = (self._done - self._done_before) / passed
        text = f"{self._label}{self._done / self._scale:,.0f} of {self._total / self._scale:,.0f} {self._name}"
        if not rate:
            return f"{text}, {duration(passed)} so far"
        rest = self._total - self._done
        end = f"{duration(rest / rate)} left" if rest > 0 else f"in {passed:.1f} s"
        return f"{text}, {_rounded(rate / self._scale)} {self._name}/s, {end}"


def duration(seconds: float) -> str:
    """3:07, 2:03:07 or 4 d 02:03:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes}:{rest:02d}"
    if hours < 24:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{hours // 24} d {hours % 24:02d}:{minutes:02d}:{rest:02d}"


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
