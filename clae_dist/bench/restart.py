"""`clae bench restart`: the time from kill -9 of a rank to the next training step, by its parts.

A rank of a small run on this machine is killed repeatedly, and the launcher restarts the run. A large run additionally takes
the time to read its checkpoint, to compile, and that of its scheduler.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import psutil  # type: ignore[import-untyped]
import torch

from clae_dist.bench.measure import Say, Times, make_rows
from clae_dist.bench.outcome import Outcome
from clae_dist.bench.start import python_process
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import ClaeError
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.goodput import read_lines

T = TypeVar("T")
_TIMEOUT_S = 300.0
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
    "noticed": "until the launcher has noticed the lost rank and ended the others",
    "processes": "until new ranks are forked and have joined a process group",
    "opened": "until shards, model and the newest checkpoint are open",
    "first_step": "until the end of the first step",
    "repeated": "until the steps since the checkpoint are repeated and one more is done",
}


@dataclass(frozen=True)
class RestartBench:
    workers: int = 2
    kills: int = 5


FULL = RestartBench()
QUICK = RestartBench(kills=1)


class RunEndedError(ClaeError, RuntimeError):
    """The run ended, or made no progress, before it was killed."""


def bench(settings: RestartBench, say: Say) -> Outcome:
    """Return a row for each part and one for their sum. Raises RunEndedError."""
    with tempfile.TemporaryDirectory(prefix="clae-restart-") as name:
        folder = Path(name)
        write_synthetic_set(folder / "shards", 256, 32, num_shards=4)
        (folder / "recipe.yaml").write_text(_RECIPE)
        times: dict[str, Times] = {part: Times([]) for part in (*PARTS, "all")}
        with _victim(folder, settings.workers) as victim:
            for kill in range(settings.kills):
                seconds = victim.kill_once()
                for part, value in {**seconds, "all": sum(seconds.values())}.items():
                    times[part].wall.append(value)
                say(f"kill {kill + 1} of {settings.kills}: {sum(seconds.values()):.1f} s to the next new step")
    case = f"kill -9 of one of {settings.workers} ranks on this machine, small_resnet"
    rows = make_rows(case, {**PARTS, "all": "from the kill to the first new step"}, times)
    return Outcome([replace(row, ratio_to={}) for row in rows], torch.device("cpu"))


@contextmanager
def _victim(folder: Path, workers: int) -> Iterator[_Victim]:
    """A run that does not end by itself; its ranks end with the process that started them."""
    run_dir, log = folder / "run", folder / "output.log"
    train = ["-m", "clae_dist", "train", str(folder / "recipe.yaml"), f"launch.workers={workers}"]
    with python_process([*train, f"data.shards={folder / 'shards'}", f"run_dir={run_dir}"], log) as process:
        yield _Victim(process, run_dir, log)


@dataclass(frozen=True)
class _Victim:
    process: subprocess.Popen[bytes]
    run_dir: Path
    log: Path

    def kill_once(self) -> dict[str, float]:
        """Seconds of each part. The kill comes half-way between two checkpoints."""
        reached = self._until(lambda: self._step() if self._step() % 10 == 5 and self._step() > 10 else 0)
        starts = len(self._times("start"))
        killed = time.time()
        self._ranks()[-1].kill()
        self._until(lambda: len(self._times("resume")) > starts)
        # psutil rounds the boot time to seconds, so its times may be up to a second early.
        early_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) - psutil.boot_time()
        noticed = min(process.create_time() for process in self._ranks()) + early_s
        started, resumed = self._times("start")[-1], self._times("resume")[-1]
        self._until(lambda: self._step() < reached)  # steps that are repeated are removed from the file
        begin = self._step()
        self._until(lambda: self._step() > begin)
        first = time.time()
        self._until(lambda: self._step() > reached)
        times = [killed, noticed, started, resumed, first, time.time()]
        return {part: max(0.0, times[i + 1] - times[i]) for i, part in enumerate(PARTS)}

    def _until(self, happened: Callable[[], T]) -> T:
        """Wait until `happened` returns a true value, and return it. Raises RunEndedError."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not (result := happened()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RunEndedError(f"the run to be killed made no progress:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.005)
        return result

    def _step(self) -> int:
        """The step of the newest line of metrics; 0 before the first."""
        try:
            text = RunFolder(self.run_dir).metrics_file.read_text()
        except FileNotFoundError:
            return 0
        lines = text[: text.rfind("\n") + 1].splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def _times(self, event: str) -> list[float]:
        """The time of `event` in each start of the run, in seconds since 1970."""
        return [float(line["at"]) for line in read_lines(self.run_dir) if line["event"] == event]

    def _ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, oldest first."""
        ranks = [rank for server in psutil.Process(self.process.pid).children() for rank in server.children()]
        return sorted(ranks, key=lambda process: process.create_time())
