"""A run on a terminal: its lines above a progress bar, which the lines about steps move. In a log the same lines stay lines.

The process that reads a run's lines shows them: rank 0 (local, torchrun), or the driver, which tails them (Ray). So there is
one bar, whoever starts the ranks, and a run needs no other channel.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

from clae_dist.tracking.console import STARTING, StepLine, read_line

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

QUIET = "CLAE_QUIET"  # a run says nothing on stdout; launchers and ranks inherit it


def shown_on(stream: TextIO) -> TextIO | None:
    """Where a run's lines are shown: `stream` itself, a bar where that is a terminal, None where nothing is to be said."""
    if os.environ.get(QUIET):
        return None
    if not stream.isatty():
        return stream
    from rich.console import Console

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not console.is_terminal or console.is_dumb_terminal:
        return stream
    return Terminal(console)  # type: ignore[return-value]


def announce(text: str) -> None:
    """A line of a launcher's own, before there are ranks."""
    if not os.environ.get(QUIET):
        print(text, flush=True)


class Terminal:
    """A text stream on a rich console. `close` leaves the bar as it is; what comes later begins another one."""

    def __init__(self, console: Any) -> None:
        self._console = console
        # A process that is killed cannot bring the cursor back.
        console.show_cursor = lambda show=True: False
        self._rest = ""
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._show(line)
        return len(text)

    def flush(self) -> None:
        self._console.file.flush()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def _show(self, line: str) -> None:
        from rich.text import Text

        place = read_line(line)
        if place is not None:
            self._move(place)
        elif line.startswith(STARTING):
            self._wait(line.removeprefix(STARTING))
        else:
            if line.startswith(("finished:", "stopped after")):
                self.close()
            head, colon, rest = line.partition(": ")
            known = bool(colon) and head.isalpha() and head.islower()
            text = Text.assemble((f"{head}: ", "bold cyan"), rest) if known else Text(line)
            self._console.print(text, soft_wrap=True)

    def _move(self, place: StepLine) -> None:
        """The bar at a step of the run."""
        progress, task = self._bar()
        if place.loss:
            progress.update(task, loss=place.loss, speed=place.speed, left=place.left)
        elif place.note:
            self._console.print(f"step {place.step}: {place.note}", soft_wrap=True)
        progress.update(
            task, description="training", completed=place.step, total=place.total, steps=f"{place.step}/{place.total}"
        )

    def _wait(self, text: str) -> None:
        """The bar while something is going on that has no steps."""
        progress, task = self._bar()
        progress.update(task, description=text[:60], refresh=True)

    def _bar(self) -> tuple[Progress, TaskID]:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        if self._progress is None or self._task is None:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[steps]}"),
                TextColumn("{task.fields[loss]}", style="green"),
                TextColumn("{task.fields[speed]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", style="yellow"),
                console=self._console,
                redirect_stdout=False,
                redirect_stderr=False,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("", total=None, steps="", loss="", speed="", left="")
            self._progress.start()
        return self._progress, self._task


def lines_shown_on_stdout(rank: str) -> TextIO | None:
    """Where rank 0's lines are shown; the other ranks say nothing."""
    return shown_on(sys.stdout) if rank == "0" else None
