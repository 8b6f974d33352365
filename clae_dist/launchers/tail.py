"""Shows what the ranks of a run, on whichever hosts, append to its console."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from clae_dist.launchers.terminal import Terminal, shown_on
from clae_dist.runs.following import follow
from clae_dist.tracking.console import STARTING


class ConsoleTail:
    """As a context manager; `show` is to be called now and then."""

    def __init__(self, folder: Path, *, here: bool) -> None:
        self._console = follow(folder, here=here)
        self._shown: Any = shown_on(sys.stdout)

    def __enter__(self) -> ConsoleTail:
        return self

    def show(self) -> None:
        self._show(self._console.read())

    def wait_for(self, what: str) -> None:
        """Shows on a terminal that `what` is being started; a log has had its line."""
        if isinstance(self._shown, Terminal):
            self._shown.write(f"{STARTING}{what}\n")

    def __exit__(self, *exception: object) -> None:
        self._show(self._console.close())
        if isinstance(self._shown, Terminal):
            self._shown.close()

    def _show(self, text: str) -> None:
        if text and self._shown is not None:
            self._shown.write(text)
            self._shown.flush()
