"""`clae bench restart`: from kill -9 of a rank to the next training step, split into its parts.

A small run on ranks of this machine is killed again and again; its launcher starts it again by itself. What a large run adds
is the time to read its checkpoint and to compile, and its scheduler's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil  # type: ignore[import-untyped]
import torch

from clae_dist.bench.measure import Row, Say
from clae_dist.bench.outcome import Outcome
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import ClaeError
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.goodput import read_lines

T = TypeVar("T")
_PATIENCE_S = 300.0
_RECIPE = """\
data: {image_size: 32, workers: 0}
batch: {global_size: 32}
model: {encoder: small_resnet}
optim: {name: adamw, learning_rate: 1e-3, scaling: none, warmup_epochs: 0}
train: {epochs: 100000, log_every: 1, diagnose_every: 1000000, knn_every: 0}
checkpoint: {every_steps: 10}
launch: {launcher: local, max_failures: 1000}
tracking: {name: none}
"""
PARTS = {
    "noticed": "the launcher sees that a rank is gone, and ends the others",
    "processes": "new ranks, forked, and their process group",
    "opened": "shards, model and the newest checkpoint",
    "first_step": "the first batch and step after it",
    "repeated": "the steps since the checkpoint again, and one more",
}


@dataclass(frozen=True)
class RestartBench:
    workers: int = 2
    kills: int = 5


QUICK = RestartBench(kills=1)


class RunEndedError(ClaeError, RuntimeError):
    """The run ended before it was killed."""


def bench(settings: RestartBench, say: Say) -> Outcome:
    """A row a part, and one for all of them. Raises RunEndedError."""
    with tempfile.TemporaryDirectory(prefix="clae-restart-") as name:
        folder = Path(name)
        write_synthetic_set(folder / "shards", 256, 32, num_shards=4)
        (folder / "recipe.yaml").write_text(_RECIPE)
        victim = _Victim(folder, settings.workers)
        try:
            found = []
            for kill in range(settings.kills):
                found.append(victim.kill_once())
                say(f"kill {kill + 1} of {settings.kills}: {sum(found[-1].values()):.1f} s to the next new step")
        finally:
            victim.end()
    case = f"kill -9 of one of {settings.workers} ranks on this machine, small_resnet"
    rows = [_row(case, f"{part}: {what}", [one[part] for one in found]) for part, what in PARTS.items()]
    rows.append(_row(case, "all: from the kill to the first step that is new", [sum(one.values()) for one in found]))
    return Outcome(rows, torch.device("cpu"))


def _row(case: str, what: str, seconds: list[float]) -> Row:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median, median, median)
    return Row(case, what, median, (high - low) / median if median else 0.0, {})


class _Victim:
    """A run without end, started as a user would."""

    def __init__(self, folder: Path, workers: int) -> None:
        self._run_dir = folder / "run"
        ends_with_this = [sys.executable, "-m", "clae_dist.lifetime", str(os.getpid())]
        train = [sys.executable, "-m", "clae_dist", "train", str(folder / "recipe.yaml"), f"launch.workers={workers}"]
        self._log = folder / "output.log"
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                [*ends_with_this, *train, f"data.shards={folder / 'shards'}", f"run_dir={self._run_dir}"],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=Path(__file__).parents[2],  # where Python finds this package, installed or not
            )

    def end(self) -> None:
        """The ranks end with the process that started them."""
        self._process.kill()
        self._process.wait()

    def kill_once(self) -> dict[str, float]:
        """Seconds of each part. The kill comes half-way between two checkpoints."""
        reached = self._until(lambda: self._step() if self._step() % 10 == 5 and self._step() > 10 else 0)
        starts = len(self._times("start"))
        killed = time.time()
        self._ranks()[-1].kill()
        self._until(lambda: len(self._times("resume")) > starts)
        # psutil counts from the second in which the machine booted, and may be nearly one early.
        early_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) - psutil.boot_time()
        noticed = min(process.create_time() for process in self._ranks()) + early_s
        started, resumed = self._times("start")[-1], self._times("resume")[-1]
        self._until(lambda: self._step() < reached)  # what is done again is taken out of the file
        begun = self._step()
        self._until(lambda: self._step() > begun)
        first = time.time()
        self._until(lambda: self._step() > reached)
        times = [killed, noticed, started, resumed, first, time.time()]
        return {part: max(0.0, times[i + 1] - times[i]) for i, part in enumerate(PARTS)}

    def _until(self, happened: Callable[[], T]) -> T:
        deadline = time.monotonic() + _PATIENCE_S
        while not (found := happened()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RunEndedError(f"the run to be killed made no progress:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.005)
        return found

    def _step(self) -> int:
        """Of the newest line of metrics; 0 before the first."""
        try:
            text = RunFolder(self._run_dir).metrics_file.read_text()
        except FileNotFoundError:
            return 0
        whole = text[: text.rfind("\n") + 1].splitlines()
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def _times(self, event: str) -> list[float]:
        """When the starts of the run came to `event`, in seconds since 1970."""
        return [float(line["at"]) for line in read_lines(self._run_dir) if line["event"] == event]

    def _ranks(self) -> list[psutil.Process]:
        """Their processes, the oldest first."""
        ranks = [rank for server in psutil.Process(self._process.pid).children() for rank in server.children()]
        return sorted(ranks, key=lambda process: process.create_time())
