"""Output that survives its reader: a run does not end because `tee` did, or because the disk of its log is full."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_LOST = (OSError, ValueError)  # no reader, no room; closed


class Output:
    """A text stream that drops lines it cannot write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(*_LOST):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(*_LOST):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, stdout and stderr are such streams; what is left in them cannot fail the end of this process."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Output(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            drain(stream)


def drain(stream: TextIO) -> None:
    """Writes what the stream holds back, or drops it."""
    try:
        stream.flush()
    except _LOST:
        with suppress(*_LOST):  # Python's own flush at the end would change the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
