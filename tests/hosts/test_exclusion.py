"""A host that ends two starts in a row without progress is excluded, under torchrun, Ray and Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from clae_dist.runs.ends import read_ends
from clae_dist.runs.exclusion import excluded_hosts, readmit
from tests.hosts.broken import BAD_GPU, KILLED, break_host
from tests.hosts.cluster import Hosts
from tests.hosts.needs import require
from tests.hosts.ray_cluster import RayCluster
from tests.hosts.slurm import Slurm, submit, why_not
from tests.hosts.small import assert_steps_once, wait_for
from tests.hosts.test_slurm import SCRIPT, until
from tests.hosts.test_torchrun import torchrun
from tests.processes import finish


def causes(run_dir: Path) -> list[tuple[str, str]]:
    return [(end.cause, end.host) for end in read_ends(run_dir)]


@pytest.mark.slow
def test_an_elastic_torchrun_goes_on_without_the_host(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    """Its rank is killed each time and can say nothing: the others name the host by the address of the lost connection."""
    run_dir, env = tmp_path / "run", break_host(tmp_path / "site", "host2", KILLED)
    line = torchrun(hosts, "2:3", recipe, [f"run_dir={run_dir}"])
    start = [hosts.popen(host, line, env) for host in range(3)]
    code, said = finish(start[2])
    assert code == 4, said
    assert "excluding host2: host2 ended two starts in a row without a new checkpoint between, the second by host" in said
    assert f"`clae status {run_dir} --readmit host2` uses it again" in said
    wait_for(run_dir, "ranks: 2 on 2 hosts", start[:2])
    again = hosts.run(2, line, env)  # as its scheduler does
    assert again.returncode == 4, again.stdout
    assert "this host does not join: host2 ended two starts" in again.stdout
    for process in start[:2]:
        code, said = finish(process)
        assert code == 0, said
    assert causes(run_dir) == [("host", "host2"), ("host", "host2"), ("finished", "host0")]
    assert_steps_once(run_dir)
    readmit(run_dir, "host2")
    assert excluded_hosts(run_dir) == {}


@pytest.mark.long
def test_ray_places_no_worker_on_the_host(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run_dir, env = tmp_path / "run", break_host(tmp_path / "site", "host1", BAD_GPU)
    with RayCluster(hosts, env) as cluster:
        process = cluster.submit(recipe, [f"run_dir={run_dir}", "launch.workers=3", "launch.min_workers=2"])
        code, said = finish(process)
    assert code == 0, said
    assert "ray: host1 ended two starts in a row without a new checkpoint between, the second by host (" in said
    assert "It is excluded." in said
    assert "ranks: 2 on 2 hosts" in said
    assert [cause for cause, _ in causes(run_dir)] == ["host", "host", "finished"]
    assert_steps_once(run_dir)


@pytest.mark.slow
def test_a_slurm_job_goes_on_without_the_node(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    """The first of two nodes, which has the batch script and the rendezvous, in the same allocation."""
    require(why_not())
    run_dir, env = tmp_path / "run", break_host(tmp_path / "site", "host0", BAD_GPU)
    output = tmp_path / "job.out"
    with Slurm(hosts) as slurm:
        job = submit(slurm, SCRIPT, [f"--output={output}"], [str(recipe), f"run_dir={run_dir}"], CLAE_MIN_NODES="1", **env)
        until(slurm, job, {"COMPLETED 0"}, output)
    said = output.read_text()
    assert "excluding host0: host0 ended two starts in a row" in said
    assert "excluding host0, which failed twice without progress; starting again on 1 node" in said
    assert "--exclude=host0" in said
    assert causes(run_dir) == [("host", "host0"), ("host", "host0"), ("finished", "host1")]
    assert_steps_once(run_dir)
