"""A Ray cluster on hosts of network namespaces, made by launch/ray-cluster.sh."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.hosts.cluster import Hosts, clean_environment
from tests.processes import Completed, Process

SCRIPT = "launch/ray-cluster.sh"


class RayCluster:
    """As a context manager: head on host 0 with `head_cpus` cores for ranks, a worker of one core on each other.

    `env` is for what its commands start, `own` for those of a host.
    """

    def __init__(
        self,
        hosts: Hosts,
        env: Mapping[str, str] | None = None,
        own: Callable[[int], Mapping[str, str]] = lambda host: {},
        head_cpus: int = 1,
    ) -> None:
        self.hosts, self._env, self._own, self._head_cpus = hosts, dict(env or {}), own, head_cpus

    def env(self, host: int) -> dict[str, str]:
        return {**self._env, **self._own(host)}

    def __enter__(self) -> RayCluster:
        self.folder = Path(tempfile.mkdtemp(prefix="clae-r-", dir="/tmp"))  # unix sockets: a short path
        self.token = self.folder / "secret" / "token"
        self.said = [self.ok(0, "head", "--address", self.hosts.address(0), "--cpus", str(self._head_cpus))]
        self.said += [self.join(host) for host in range(1, self.hosts.num_hosts)]
        return self

    def __exit__(self, *exception: object) -> None:
        for host in range(self.hosts.num_hosts):
            self.hosts.kill(host)
        shutil.rmtree(self.folder, ignore_errors=True)

    def line(self, host: int, *words: str) -> list[str]:
        return [SCRIPT, *words, "--temp-dir", f"{self.folder}/{host}", "--token-file", str(self.token)]

    def __call__(self, host: int, *words: str, env: Mapping[str, str] | None = None) -> Completed:
        return self.hosts.run(host, self.line(host, *words), {**self.env(host), **(env or {})}, timeout_s=240)

    def ok(self, host: int, *words: str, env: Mapping[str, str] | None = None) -> str:
        done = self(host, *words, env=env)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def join(self, host: int, env: Mapping[str, str] | None = None) -> str:
        return self.ok(host, "worker", self.hosts.address(0), "--cpus", "1", env=env)

    def submit(self, recipe: Path, overrides: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> Process:
        return self.hosts.popen(0, self.line(0, "submit", str(recipe), *overrides), {**self.env(0), **(env or {})}, **options)

    def node(self, host: int) -> str:
        """Ray's name of the live node on a host."""
        lines = [line.split() for line in self.ok(0, "status").splitlines() if " alive " in line]
        (found,) = [words[-1] for words in lines if words[0] == self.hosts.name(host)]
        return found

    def kill_raylet(self, host: int) -> None:
        (raylet,) = [pid for pid in self.hosts.pids(host) if _program(pid).endswith("/raylet")]
        os.kill(raylet, signal.SIGKILL)

    def drain(self, host: int, seconds: int) -> None:
        """Says that a host will be taken away, as a cloud does before it preempts one."""
        python = f"{clean_environment()['CLAE_ENV']}/bin/python"
        words = ["drain-node", "--address", f"{self.hosts.address(0)}:6379", "--node-id", self.node(host)]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        words += ["--deadline-remaining-seconds", str(seconds)]
        secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        done = self.hosts.run(0, [python, "-m", "ray.scripts.scripts", *words], secret)
        assert done.returncode == 0, done.stdout


def _program(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except FileNotFoundError:
        return ""
