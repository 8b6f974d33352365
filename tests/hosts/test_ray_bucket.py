"""Runs in a bucket on hosts of Ray that share nothing but shards and recipe; the host that submits them has no rank."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from clae_dist import object_store
from clae_dist.errors import OK, STOPPED, STORAGE
from clae_dist.runs.copies import fetch
from clae_dist.runs.folder import RunFolder
from clae_dist.staging import copy_folder
from tests.hosts.cluster import Hosts
from tests.hosts.needs import require_hosts
from tests.hosts.ray_cluster import RayCluster
from tests.hosts.small import LONG, LONG_STEPS, assert_steps_once
from tests.object_server import BUCKET, SECRET, ObjectServer, serve_s3
from tests.processes import Process, clae, environment, finish
from tests.small_run import Undisturbed, assert_same_weights, weights

pytest.importorskip("ray")
RUNS = f"s3://{BUCKET}/runs"


class Site:
    """Hosts 1 to 3 with a rank each; the bucket; each host's cache, and another one for `submit`."""

    def __init__(self, hosts: Hosts, server: ObjectServer, folder: Path) -> None:
        self.server, self._folder = server, folder
        self.without_credentials: set[int] = set()
        self.cluster = RayCluster(hosts, own=self._env, head_cpus=0)

    def _env(self, host: int) -> dict[str, str]:
        nothing = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        folders = {f"XDG_{kind}_HOME": f"{self._folder}/{host}/{kind.lower()}" for kind in ("CACHE", "STATE")}
        return {**self.server.environment, **folders, **(nothing if host in self.without_credentials else {})}

    def submit(self, recipe: Path, name: str, *overrides: str) -> Process:
        words = [f"run_dir={RUNS}/{name}", "launch.workers=3", *(f"train.{key}={value}" for key, value in LONG.items())]
        return self.cluster.submit(recipe, [*words, *overrides], {"CLAE_CACHE": f"{self._folder}/submitter"})

    def wait_for(self, process: Process, name: str, words: str, times: int = 1) -> None:
        """Until ranks have said it, on their own hosts, so often."""
        deadline = time.monotonic() + 400
        while sum(path.read_text().count(words) for path in self._folder.glob(f"*/cache/**/runs/{name}/console.log")) < times:
            ended = process.poll() is not None
            assert not ended, process.communicate()[0]
            assert time.monotonic() < deadline, words
            time.sleep(0.05)

    def kill_rank(self, host: int) -> None:
        """kill -9 of Ray's worker that trains on a host."""
        (pid,) = [
            pid for pid in self.cluster.hosts.pids(host) if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(pid, signal.SIGKILL)

    def files(self) -> Iterator[bytes]:
        """All that Ray, the ranks and the bucket keep."""
        for folder in (self.cluster.folder, self._folder):
            yield from (path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        yield from (self.server.read(name) for name in self.server.names())


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    require_hosts()
    with ExitStack() as stack:
        hosts = stack.enter_context(Hosts(4))
        made = Site(hosts, stack.enter_context(serve_s3(hosts.outside)), tmp_path / "hosts")
        made.without_credentials = {3}
        stack.enter_context(made.cluster)
        yield made


def fetched(name: str) -> Path:
    """The run as a machine outside gets it."""
    folder = copy_folder(f"{RUNS}/{name}")
    shutil.rmtree(folder, ignore_errors=True)
    assert fetch(folder) is not None
    return folder


def assert_shown(said: str, console: str) -> None:
    """The lines of the run in the submitter's output are those of the console in the bucket, each as often."""
    lines = [
        line for line in console.splitlines() if line.startswith(("step ", "resuming", "stopped after", "finished:", "ranks:"))
    ]
    shown = [line for line in said.splitlines() if line in set(lines)]
    assert sorted(shown) == sorted(lines)


def assert_complete(site: Site, runs: dict[str, Path], steps: int) -> None:
    """The finished runs are there for commands outside, nothing of a process is left, and no secret was written anywhere."""
    for name, folder in runs.items():
        assert_steps_once(folder, steps)
        assert "finished" in clae("status", f"{RUNS}/{name}", env=environment()).stdout
        assert json.loads(clae("checkpoints", f"{RUNS}/{name}", "--json", env=environment()).stdout)[0]["step"] == steps
        assert f"runs/{name}/heartbeat.json" in site.server.names()
    listed = json.loads(clae("runs", RUNS, "--json", env=environment()).stdout)
    assert {run["folder"]: run["state"] for run in listed} == {f"{RUNS}/{name}": "finished" for name in runs}
    assert [name for name in site.server.names() if name.endswith(("/STOP", ".lease"))] == []
    assert not any(SECRET.encode() in content for content in site.files())


@pytest.mark.long
def test_a_run_in_a_bucket_on_hosts_that_share_nothing(
    site: Site, recipe: Path, tmp_path: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host without credentials, SIGUSR1 to the submitter, kill -9 of a rank, and a host that is lost."""
    code, said = finish(site.submit(recipe, "first"))
    assert code == STORAGE, said
    assert f"on host3: {RUNS}/first cannot be used: there are no credentials" in said
    site.without_credentials.clear()
    site.cluster.ok(3, "stop")
    site.cluster.join(3)

    process = site.submit(recipe, "first")
    site.wait_for(process, "first", "step   5/120")
    process.send_signal(signal.SIGUSR1)
    code, first = finish(process)
    assert code == STOPPED, first
    assert "ranks: 3 on 3 hosts" in first
    process = site.submit(recipe, "first")
    site.wait_for(process, "first", "step  20/120")
    site.kill_rank(2)
    code, second = finish(process)
    assert code == OK, second

    process = site.submit(recipe, "second", "launch.min_workers=2", "launch.look_every_s=1")
    site.wait_for(process, "second", "step   5/120")
    site.cluster.kill_raylet(3)
    code, third = finish(process)
    assert code == OK, third
    assert "ranks: 2 on 2 hosts" in third

    for name, value in {**site.server.environment, "CLAE_CACHE": str(tmp_path / "outside")}.items():
        monkeypatch.setenv(name, value)
    object_store._filesystem.cache_clear()
    run = fetched("first")
    assert_same_weights(run, undisturbed(3, **LONG), LONG_STEPS)
    assert_shown(first + second, RunFolder(run).console_file.read_text())
    resumed = [int(step) for step in re.findall(r"resuming after step (\d+)", RunFolder(run).console_file.read_text())]
    assert 5 <= resumed[0] < resumed[1] <= 20 + 4  # from a checkpoint after the first resumption
    other = fetched("second")
    assert_shown(third, RunFolder(other).console_file.read_text())
    found, wanted = weights(other, LONG_STEPS), weights(undisturbed(3, **LONG), LONG_STEPS)
    # float64: two ranks and three differ in the order of summation
    assert all(torch.allclose(found[key], wanted[key], rtol=1e-6, atol=1e-8) for key in wanted)
    assert_complete(site, {"first": run, "second": other}, LONG_STEPS)
