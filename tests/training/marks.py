"""The cost of telling which rank is slow: the line of the record.

    python -m tests.training.marks SHARDS [key=value …]

Two ranks train by the quickstart's recipe. The marks around the parts of a step and the waits in it are counted, and a mark is
timed alone, in CPU seconds of the main thread, which another program on the machine does not change.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clae_dist.launchers import local
from clae_dist.launchers.rank import Ending
from clae_dist.recipe import Recipe, resolve
from clae_dist.training import clock as clocks
from clae_dist.training.clock import Clock
from clae_dist.training.pace import Pace

_MARKS, _REPEATS = 20_000, 9


def seconds_of(mark: Callable[[], Any]) -> float:
    """CPU seconds of a mark: the median of some repeats."""
    found = []
    for _ in range(_REPEATS):
        begin = time.thread_time()
        for _ in range(_MARKS):
            with mark():
                pass
        found.append((time.thread_time() - begin) / _MARKS)
    return statistics.median(found)


class Counts:
    """Of a rank, from the second window of Pace on: steps, marks by kind, and CPU seconds in Pace and in all."""

    def __init__(self) -> None:
        self.steps, self.waits, self.parts, self.pace_s, self.begin = 0, 0, 0, 0.0, 0.0

    def watch(self) -> None:
        """Count the marks of this process from now on."""
        timed, enter, step = Clock.timed, clocks._Waiting.__enter__, Pace.step

        def count_part(clock: Clock, name: str) -> Any:
            self.parts += 1
            return timed(clock, name)

        def count_wait(waiting: Any) -> None:
            self.waits += 1
            enter(waiting)

        def count_step(pace: Pace, batch: Any) -> None:
            self.steps += 1
            begin = time.thread_time()
            step(pace, batch)
            self.pace_s += time.thread_time() - begin
            if self.steps == 1:
                self.waits, self.parts, self.pace_s, self.begin = 0, 0, 0.0, begin
            self.all_s = time.thread_time() - self.begin

        Clock.timed, clocks._Waiting.__enter__, Pace.step = count_part, count_wait, count_step  # type: ignore[method-assign]


def counted(recipe: Recipe, debug: bool) -> Ending:
    """The work of a rank. Writes RUN/marks-RANK.json."""
    clock = Clock(torch.device("cpu"))
    cost = {"part_s": seconds_of(lambda: clock.timed("forward")), "wait_s": seconds_of(clock.waiting)}
    counts = Counts()
    counts.watch()
    ending = local._train(recipe, debug)
    path = recipe.config.folder / f"marks-{os.environ['RANK']}.json"
    path.write_text(json.dumps({**vars(counts), **cost}))
    return ending


def main(shards: str, *settings: str) -> None:
    """Print a line for each rank."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        own = [f"data.shards={shards}", f"run_dir={run_dir}", "launch.launcher=local", "tracking.name=none"]
        recipe = resolve("quickstart", [*own, "train.epochs=0.1", "train.knn_every=0", "data.workers=0", *settings])
        run_dir.mkdir()
        ending = local.launch(recipe, work=counted)
        if ending.code:
            sys.exit(ending.message)
        for path in sorted(run_dir.glob("marks-*.json")):
            print(describe(json.loads(path.read_text())))


def describe(found: dict[str, float]) -> str:
    """One rank's line."""
    steps = found["steps"] - 1
    marks_s = found["parts"] * found["part_s"] + found["waits"] * found["wait_s"]
    return (
        f"{found['parts'] / steps:.0f} parts of {1e6 * found['part_s']:.1f} µs and {found['waits'] / steps:.0f} waits of "
        f"{1e6 * found['wait_s']:.1f} µs a step, comparing {1e6 * found['pace_s'] / steps:.0f} µs; a step takes "
        f"{1e3 * found['all_s'] / steps:.0f} ms of CPU time: {100 * (marks_s + found['pace_s']) / found['all_s']:.3f} %"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
