"""A night on a cluster: one run, disturbed again and again, and started again by the same command where it ended.

Hosts are network namespaces (tests/hosts) under Ray, with one rank each. Shards come over http, metrics go to an MLflow server,
the run folder is a small file system of its own, so that all of them can be taken away.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.hosts.cluster import Hosts
from tests.hosts.ray_cluster import RayCluster
from tests.processes import ROOT, Process

PATIENCE_S = 400.0  # for a run to get further, whatever happened
NUM_HOSTS = 3


@dataclass
class Mended:
    """A fault, and what came of it. Seconds are from the fault to the first step after it that had not been trained before."""

    fault: str
    step: int
    seconds: float
    repeated: int  # steps that were trained again
    commands: int  # how often the command had to be given again
    said: str


@dataclass
class Night:
    """The cluster, the run and what happens to it. `command` is that of a user on host 0, run_dir lies on `disk`."""

    cluster: RayCluster
    folder: Path
    disk: Path
    settings: list[str]
    recipe: Path
    draw: random.Random
    shard_server: Process | None = None
    mlflow: Callable[[], Process] | None = None
    mlflow_server: Process | None = None
    submitted: Process | None = None
    commands: int = 0
    log: list[str] = field(default_factory=list)

    @property
    def hosts(self) -> Hosts:
        return self.cluster.hosts

    @property
    def run_dir(self) -> Path:
        return self.disk / "run"

    @property
    def records(self) -> Path:
        return self.folder / "records"

    # ---- the cluster ----

    def start(self) -> None:
        self.records.mkdir(parents=True, exist_ok=True)
        if self.mlflow:
            self.mlflow_server = self.mlflow()
        self.submit()

    def submit(self) -> None:
        """The user's command, the first time and again."""
        self.commands += 1
        with (self.folder / "driver.log").open("a") as output:
            self.submitted = self.cluster.submit(self.recipe, [f"run_dir={self.run_dir}", *self.settings], stdout=output)

    def close(self) -> None:
        for server in (self.shard_server, self.mlflow_server):
            if server is not None:
                kill_family(server)

    # ---- what can be seen from outside ----

    def last_step(self) -> int:
        """The newest step in metrics.jsonl, 0 before the first."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return 0
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError):
                continue
        return 0

    def wait(self, happened: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        """Until `happened`; the command is given again whenever it has ended without finishing the run."""
        deadline = time.monotonic() + patience_s
        while not happened():
            assert self.submitted is not None
            code = self.submitted.poll()
            if code == 0:
                if happened():
                    return
                raise AssertionError(f"the run ended before {what}")
            if code is not None:
                self.log.append(f"exit code {code}: {self.last_words()}")
                assert code in (4, 5, 75, 1, -signal.SIGKILL), self.log[-1]
                self.submit()
            assert time.monotonic() < deadline, f"{what} did not come in {patience_s:g} s:\n{self.tail()}"
            time.sleep(0.05)

    def last_words(self) -> str:
        lines = [line for line in self.tail().splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def tail(self) -> str:
        path = self.folder / "driver.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def processes(self, host: int, name: str) -> list[psutil.Process]:
        """Those of a host whose command line holds `name`."""
        found = []
        for pid in self.hosts.pids(host):
            try:
                process = psutil.Process(pid)
                if name in " ".join(process.cmdline()) or name == process.name():
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def rank_processes(self) -> list[psutil.Process]:
        return [process for host in range(NUM_HOSTS) for process in self.processes(host, "ray::RayTrainWorker")]

    # ---- the night itself ----

    def suffer(self, name: str, fault: Callable[[Night], None], step: int) -> Mended:
        """Waits for `step`, inflicts the fault, waits until the run has got further than ever before."""
        self.wait(lambda: self.last_step() >= step, f"step {step} (before {name})")
        commands, seen, words = self.commands, len(list_restarts(self)), len(self.log)
        begin, struck_at = time.monotonic(), self.last_step()
        fault(self)
        reached = max(struck_at, self.last_step()) + 1  # that one may have been under way
        self.wait(lambda: self.last_step() > reached, f"a step after {name} at step {struck_at}")
        seconds = time.monotonic() - begin
        repeated = sum(max(0, struck_at - first) for first in list_restarts(self)[seen:][:1])
        return Mended(name, struck_at, seconds, repeated, self.commands - commands, "; ".join(self.log[words:]))

    def finish(self) -> None:
        """Waits for the end of the run."""
        assert self.submitted is not None
        self.wait(lambda: self.submitted is not None and self.submitted.poll() == 0, "the end of the run")


def environment(folder: Path) -> dict[str, str]:
    """Of everything on the hosts: ranks write down what they take, and Ray sees soon that a host is gone."""
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/chaos/recorder"), str(ROOT)]),
        "CLAE_RECORD": str(folder / "records"),
        "CLAE_CACHE": str(folder / "cache"),
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
    }


def list_restarts(night: Night) -> list[int]:
    """The steps after which the run was taken up again, in order, as its console says."""
    try:
        text = (night.run_dir / "console.log").read_text()
    except FileNotFoundError:
        return []
    return [int(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("resuming after step ")]


def kill_family(process: Process) -> None:
    """A server and what it has started."""
    if process.poll() is None:
        for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
    process.wait()


def flip_bytes(path: Path, draw: random.Random, count: int = 3) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(count):
        data[draw.randrange(len(data))] ^= 0xFF
    path.write_bytes(data)


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
