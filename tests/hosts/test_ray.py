"""launch/ray-cluster.sh and elastic runs on three hosts: versions, token, faults."""

from __future__ import annotations

import re
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.hosts.cluster import Hosts, clean_environment
from tests.hosts.ray_cluster import SCRIPT, RayCluster
from tests.hosts.small import LONG, LONG_STEPS, assert_steps_once, saved_steps, wait_for
from tests.processes import ROOT, Completed, finish
from tests.small_run import STEPS, Undisturbed, assert_same_weights, weights

pytest.importorskip("ray")


@pytest.fixture
def cluster(hosts: Hosts) -> Iterator[RayCluster]:
    with RayCluster(hosts) as made:
        yield made


def run_script(*arguments: str) -> Completed:
    return processes.run(ROOT / SCRIPT, *arguments, env=clean_environment(), timeout=60)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["start"], "start is not known; use head, worker, submit, status or stop"),
        (["worker"], "worker needs the head's ADDRESS"),
        (["head", "somewhere"], "head takes no somewhere"),
        (["worker", "127.0.0.1", "--token-file", "nowhere"], "is missing: it is the cluster's secret"),
        (["submit", "configs/quickstart.yaml", "--port", "1", "--token-file", "pyproject.toml"], "can be read by others (mode"),
        (["head", "--temp-dir", "/tmp/" + "x" * 60], "need a path of at most 43"),
        (["head", "--address", "192.0.2.7"], "192.0.2.7"),
    ],
)
def test_what_is_wrong_is_said_with_the_way_out(arguments: list[str], words: str) -> None:
    done = run_script(*arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_dry_run_prints_what_would_run_and_makes_nothing(tmp_path: Path) -> None:
    where = ["--token-file", str(tmp_path / "token"), "--temp-dir", str(tmp_path)[:43], "--port", "7000", "--dry-run"]
    head = run_script("head", "--address", "127.0.0.1", *where).stdout
    for words in ("--head --port=7000", "--dashboard-host=127.0.0.1", "RAY_AUTH_MODE=token", "--node-ip-address=127.0.0.1"):
        assert words in head
    worker = run_script("worker", "127.0.0.1:7000", "--cpus", "3", *where).stdout
    assert "--num-cpus=0" in run_script("head", "--address", "127.0.0.1", "--cpus", "0", *where).stdout
    for words in ("--address=127.0.0.1:7000", "--num-cpus=3", "GLOO_SOCKET_IFNAME=lo", "--node-manager-port=7001"):
        assert words in worker
    submit = run_script("submit", "configs/quickstart.yaml", "seed=3", *where).stdout
    assert "-m clae_dist train configs/quickstart.yaml --launcher ray seed=3" in submit
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_three_hosts_train_to_the_bits_of_one(
    cluster: RayCluster, recipe: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """And the token is needed, versions are compared, a preempted submit saves, and stop stops this host's Ray alone."""
    assert stat.S_IMODE(cluster.token.stat().st_mode) == 0o600
    wrong = tmp_path / "other-token"
    wrong.write_text("0" * 64)
    wrong.chmod(0o600)
    strange = cluster.hosts.run(1, [SCRIPT, "worker", cluster.hosts.address(0), "--token-file", str(wrong), "--port", "6379"])
    assert strange.returncode == 2
    assert "does not answer" in strange.stdout

    overrides = [f"run_dir={tmp_path}/run", "launch.workers=3"]
    process = cluster.submit(recipe, overrides)
    wait_for(tmp_path / "run", "step  5/24", [process])
    process.send_signal(signal.SIGUSR1)
    code, said = finish(process)
    assert code == 75, said
    assert 5 <= saved_steps(tmp_path / "run")[0] < STEPS
    code, said = finish(cluster.submit(recipe, overrides))
    assert code == 0, said
    assert "3 nodes, 3 CPUs, 0 GPUs; Python" in said
    assert len(said.splitlines()) < 50, said  # our lines, not Ray's
    assert "ranks: 3 on 3 hosts" in said
    assert_same_weights(tmp_path / "run", undisturbed(3))

    cluster.ok(2, "stop")
    assert cluster.hosts.pids(2) == []
    assert cluster.hosts.pids(1) != []
    newer = tmp_path / "newer"  # a host whose package is of another version
    for name in ("clae_dist", "launch"):
        shutil.copytree(ROOT / name, newer / name, symlinks=True)
    init = newer / "clae_dist" / "__init__.py"
    init.write_text(re.sub(r'__version__ = ".*"', '__version__ = "99.0"', init.read_text()))
    there = cluster.line(2, "worker", cluster.hosts.address(0))
    refused = cluster.hosts.run(2, [str(newer / SCRIPT), *there[1:]])
    assert refused.returncode == 2
    assert re.search(r"clae-dist is 99\.0 on host2, but \d\S* on host0", refused.stdout), refused.stdout
    assert cluster.hosts.pids(2) == []


def _return(cluster: RayCluster) -> None:
    """As after a reboot: a raylet that the head gave up ends by itself."""
    cluster.hosts.link_up(2)
    cluster.ok(2, "stop")
    cluster.join(2)


def _cut_off(cluster: RayCluster) -> None:
    """Ray itself gives a host up after about 65 s."""
    cluster.hosts.link_down(2)


@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(lambda cluster: cluster.kill_raylet(2), id="kill-9-raylet", marks=pytest.mark.long),
        pytest.param(_cut_off, id="link-down", marks=pytest.mark.long),
        pytest.param(lambda cluster: cluster.drain(2, 120), id="preemption-notice", marks=pytest.mark.long),
    ],
)
def test_a_lost_host_shrinks_the_run_and_its_return_grows_it(
    disturb: Callable[[RayCluster], None],
    cluster: RayCluster,
    recipe: Path,
    tmp_path: Path,
    undisturbed: Undisturbed,
) -> None:
    elastic = ["launch.workers=3", "launch.min_workers=2", "launch.look_every_s=1"]
    run_dir = tmp_path / "run"
    process = cluster.submit(recipe, [f"run_dir={run_dir}", *(f"train.{key}={value}" for key, value in LONG.items()), *elastic])
    wait_for(run_dir, "step   5/120", [process])
    begin = time.monotonic()
    disturb(cluster)
    shrunk = wait_for(run_dir, "ranks: 2 on 2 hosts", [process], timeout_s=400)
    print(f"{time.monotonic() - begin:.1f} s to a new start")
    assert ("ray: host2 takes no connection at" in shrunk) == (disturb is _cut_off)
    _return(cluster)
    code, said = finish(process, timeout_s=600)
    assert code == 0, said
    console = (run_dir / "console.log").read_text()[len(shrunk) :]
    assert "ranks: 3 on 3 hosts" in console
    assert "stopped after step" in console  # it saved before it grew
    assert_steps_once(run_dir, LONG_STEPS)
    found, wanted = weights(run_dir, LONG_STEPS), weights(undisturbed(3, **LONG), LONG_STEPS)
    # float64: two ranks and three differ in the order of summation, and what follows from a last bit grows with the steps
    assert {name: torch.allclose(found[name], wanted[name], rtol=1e-6, atol=1e-8) for name in wanted} == dict.fromkeys(
        wanted, True
    )
