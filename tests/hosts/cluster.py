"""Hosts on one machine: network namespaces with names and addresses of their own, joined by a bridge.

They share files (as hosts with shared storage do), process numbers and the clock; not the network, and not the host name.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import processes
from tests.processes import Completed, Process

DEADLINE_S = 60.0  # for what the kernel does at once


class Hosts:
    """`num_hosts` hosts, numbered from 0; as a context manager, everything of them is gone at the end."""

    def __init__(self, num_hosts: int) -> None:
        self.tag = secrets.token_hex(3)  # names of namespaces and links are the machine's: parallel runs must not meet
        self.num_hosts = num_hosts
        self._bridge = f"clae{self.tag}"
        self._net = f"10.{random.SystemRandom().randint(64, 127)}.{random.SystemRandom().randint(0, 254)}"
        self._etc = Path(tempfile.mkdtemp(prefix=f"clae-hosts-{self.tag}-"))
        self._processes: list[Process] = []

    def name(self, host: int) -> str:
        """The host's name, which every host can resolve."""
        return f"host{host}"

    def address(self, host: int) -> str:
        return f"{self._net}.{11 + host}"

    @property
    def outside(self) -> str:
        """The address at which hosts reach this process, outside of all of them."""
        return f"{self._net}.1"

    def __enter__(self) -> Hosts:
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("addr", "add", f"{self.outside}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            for host in range(self.num_hosts):
                self._make(host)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make(self, host: int) -> None:
        space, outer, inner = self._space(host), self._link(host), f"i{self.tag}{host}"
        names = "".join(f"{self.address(other)} {self.name(other)}\n" for other in range(self.num_hosts))
        (self._etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        _ip("netns", "add", space)
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        _ip("link", "set", inner, "netns", space, "name", "eth0")
        _ip("link", "set", outer, "master", self._bridge, "up")
        _ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        _ip("-n", space, "link", "set", "lo", "up")

    def popen(self, host: int, command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> Process:
        """A process on a host, started as by `processes.popen`."""
        # Not `ip netns exec`, which mounts another /sys, without the cgroups that Slurm looks for.
        named = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{self._space(host)}", "unshare", "--uts", "--mount", "sh", "-c", named]
        line = [*enter, self._etc / "hosts", self.name(host), *command]
        process = processes.popen(*line, env=clean_environment(**(env or {})), **options)
        self._processes.append(process)
        return process

    def run(
        self, host: int, command: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 120.0
    ) -> Completed:
        """Run a command on a host to its end."""
        process = self.popen(host, command, env)
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            raise AssertionError(f"{self.name(host)}: {' '.join(command)} did not end in {timeout_s:g} s:\n{said}") from None
        return subprocess.CompletedProcess(process.args, process.returncode, said)

    def link_down(self, host: int) -> None:
        """The host is cut off; its processes go on."""
        _ip("link", "set", self._link(host), "down")

    def link_up(self, host: int) -> None:
        _ip("link", "set", self._link(host), "up")

    def pids(self, host: int) -> list[int]:
        """The processes on a host."""
        return [int(word) for word in processes.run("ip", "netns", "pids", self._space(host)).stdout.split()]

    def kill(self, host: int) -> None:
        """Power off: every process on the host ends at once. The host is empty afterwards and can be used again."""
        deadline = time.monotonic() + DEADLINE_S
        while alive := [pid for pid in self.pids(host) if is_running(pid)]:
            for pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            assert time.monotonic() < deadline, f"{self.name(host)}: processes {alive} cannot be killed"
            time.sleep(0.01)

    def close(self) -> None:
        for host in range(self.num_hosts):
            self.kill(host)
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        for host in range(self.num_hosts):
            _ip("link", "del", self._link(host), check=False)
            self._delete(self._space(host))
        _ip("link", "del", self._bridge, check=False)
        shutil.rmtree(self._etc)

    def _delete(self, space: str) -> None:
        """A namespace can be busy for a moment after its last process."""
        deadline = time.monotonic() + DEADLINE_S
        while Path("/run/netns", space).exists() and time.monotonic() < deadline:
            _ip("netns", "del", space, check=False)
            time.sleep(0.05)

    def _space(self, host: int) -> str:
        return f"clae-{self.tag}-{host}"

    def _link(self, host: int) -> str:
        return f"o{self.tag}{host}"


def clean_environment(**changes: str) -> dict[str, str]:
    """This Python's environment for CLAE_ENV, nothing of the tests' own settings, and `changes`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("CLAE_", "RAY_", "SLURM_", "MLFLOW_"))}
    return {**kept, "CLAE_ENV": sys.prefix, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **changes}


def why_not() -> str:
    """Why this machine cannot have such hosts; "" when it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} missing; Debian: apt-get install iproute2 util-linux"
    space = f"clae-try-{secrets.token_hex(3)}"
    tried = processes.run("ip", "netns", "add", space)
    if tried.returncode:
        return f"`ip netns add` does not work here: {tried.stderr.strip()}"
    _ip("netns", "del", space)
    return ""


def _ip(*arguments: str, check: bool = True) -> None:
    done = processes.run("ip", *arguments)
    assert not check or done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"


def is_running(pid: int) -> bool:
    """Whether a process is there and not merely waiting for its parent to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
