"""launch/slurm.sbatch under a real two-node Slurm: preempted, requeued, finished."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clae_dist.recipe import from_yaml
from tests import processes
from tests.hosts.cluster import Hosts, clean_environment
from tests.hosts.needs import require
from tests.hosts.slurm import Slurm, submit, why_not
from tests.hosts.small import assert_steps_once
from tests.processes import ROOT, Completed
from tests.small_run import Undisturbed, assert_same_weights

SCRIPT = ROOT / "launch" / "slurm.sbatch"


@pytest.fixture
def slurm(hosts: Hosts) -> Iterator[Slurm]:
    require(why_not())
    with Slurm(hosts) as cluster:
        yield cluster


def until(slurm: Slurm, job: str, states: set[str], output: Path, timeout_s: float = 300.0) -> str:
    """The job's state, once it is one of `states`; fails with all that was said when it never is."""
    deadline = time.monotonic() + timeout_s
    while (state := slurm.state(job)) not in states:
        over = state.split()[0] in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED", "GONE") or time.monotonic() > deadline
        assert not over, f"{state}\n{output.read_text() if output.exists() else ''}\n{slurm.logs()}"
        time.sleep(0.2)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("ray", marks=pytest.mark.long)])
def test_a_preempted_job_requeues_itself_and_ends_with_the_same_bits(
    launcher: str, slurm: Slurm, recipe: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    output, run_dir = tmp_path / "job.out", tmp_path / "run"
    arguments = [str(recipe), f"run_dir={run_dir}", "checkpoint.every_steps=1000"]
    job = submit(slurm, SCRIPT, [f"--output={output}"], arguments, CLAE_LAUNCHER=launcher, CLAE_SHARED=str(tmp_path))
    until(slurm, job, {"RUNNING 0"}, output)
    deadline = time.monotonic() + 240
    while "step  5/24" not in (output.read_text() if output.exists() else ""):
        assert slurm.state(job) == "RUNNING 0", output.read_text() + slurm.logs()
        assert time.monotonic() < deadline, output.read_text() + slurm.logs()
        time.sleep(0.1)
    slurm("scancel", "--signal=USR1", "--batch", job)
    until(slurm, job, {"COMPLETED 1"}, output)
    said = output.read_text()
    assert "SIGUSR1: asking the ranks to save and leave" in said
    assert f"stopped with everything saved; requeueing job {job}" in said
    assert "started again for the 1. time" in said
    assert "resuming after step" in said
    assert "ranks: 2 on 2 hosts" in said
    assert_same_weights(run_dir, undisturbed(2))


@pytest.mark.slow
def test_a_job_array_is_a_run_for_each_index_and_one_of_them_can_be_preempted(
    slurm: Slurm, recipe: Path, tmp_path: Path
) -> None:
    options = ["--array=1-2", "--nodes=1", f"--output={tmp_path}/job-%a.out"]
    arguments = [str(recipe), f"run_dir={tmp_path}/run-%a", "seed=%a"]
    job = submit(slurm, SCRIPT, options, arguments)
    outputs = {index: tmp_path / f"job-{index}.out" for index in (1, 2)}
    deadline = time.monotonic() + 240
    while not all("step  3/24" in (path.read_text() if path.exists() else "") for path in outputs.values()):
        states = [slurm.state(f"{job}_{index}").split()[0] for index in outputs]
        assert set(states) <= {"PENDING", "RUNNING"}, slurm.logs()
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.1)
    slurm("scancel", "--signal=USR1", "--batch", f"{job}_2")
    for index, restarts in ((1, 0), (2, 1)):
        until(slurm, f"{job}_{index}", {f"COMPLETED {restarts}"}, outputs[index])
        run_dir = tmp_path / f"run-{index}"
        assert from_yaml(run_dir / "config.yaml").seed == index
        assert_steps_once(run_dir)
    assert "resuming after step" in outputs[2].read_text()


def say(*arguments: str, **environment: str) -> Completed:
    return processes.run(SCRIPT, *arguments, env=clean_environment(**environment), timeout=60)


def test_dry_run_without_slurm_says_what_each_node_would_run() -> None:
    done = say("--dry-run", "configs/quickstart.yaml", "seed=%a", SLURM_ARRAY_TASK_ID="3", SLURM_CPUS_PER_TASK="8")
    assert done.returncode == 0
    assert "srun --nodes=NODES --ntasks-per-node=1 --kill-on-bad-exit=0 --cpus-per-task=8 env" in done.stdout
    assert (
        "torchrun.sh --nodes NODES --ranks-per-node 1 --head FIRST_NODE:PORT --id JOB configs/quickstart.yaml seed=3"
        in done.stdout
    )
    assert "--signal=B:USR1@120 --requeue" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["configs/quickstart.yaml"], {}, "this is no Slurm job; submit it"),
        (["--dry-run"], {}, "no recipe was named"),
        (["--dry-run", "configs/quickstart.yaml"], {"CLAE_LAUNCHER": "mpi"}, "CLAE_LAUNCHER is mpi; use torchrun or ray."),
        (["--dry-run", "configs/quickstart.yaml"], {"CLAE_HOME": "/tmp"}, "/tmp is no checkout"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], environment: dict[str, str], words: str) -> None:
    done = say(*arguments, **environment)
    assert done.returncode == 2
    assert words in done.stderr
