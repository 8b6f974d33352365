"""The small run on several hosts: a longer version, and the checks of its history and console."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

from clae_dist.runs.folder import RunFolder
from tests.processes import Process
from tests.small_run import STEPS

# Time enough to lose a host and get it back, and float64: what two ranks and three add up in another order stays small.
LONG, LONG_STEPS = {"epochs": 30, "precision": "float64"}, 120


def saved_steps(run_dir: Path) -> list[int]:
    """The steps whose checkpoints there are, newest first."""
    return [int(path.name.removeprefix("step-")) for path in RunFolder(run_dir).find_checkpoints()]


def assert_steps_once(run_dir: Path, steps: int = STEPS) -> None:
    """The history that survived has every step exactly once, each with the images that are its own (log_every is 1)."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    seen = {line["images_seen"]: line["step"] for line in lines if "loss" in line}  # the last line of an images_seen counts
    assert seen == {24 * step: step for step in range(1, steps + 1)}


def wait_for(run_dir: Path, words: str, processes: Iterable[Process], timeout_s: float = 600.0) -> str:
    """The run's console once `words` are in it; an AssertionError with all that was said when a process ends before."""
    deadline = time.monotonic() + timeout_s
    console = run_dir / "console.log"
    while words not in (said := console.read_text() if console.exists() else ""):
        ended = [process for process in processes if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            rest = [process.communicate()[0] for process in ended]
            raise AssertionError(f"{words!r} was not said before the end:\n{said}\n{rest}")
        time.sleep(0.05)
    return said
