"""Runs as users start them, killed and stopped from outside. Whatever happens, they end with the same bits.

Nothing here waits by the clock: the console is read line by line until the run is where it should be disturbed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import FAILED, OK, STOPPED
from clae_dist.runs.checkpoint import load_checkpoint
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.goodput import account, read_lines

ROOT = Path(__file__).parents[2]
RECIPE = """\
data: {image_size: 16, workers: 0}
batch: {global_size: 16}
model: {encoder: small_resnet, projector_dim: 16}
optim: {name: adamw, learning_rate: 1e-3, scaling: none, warmup_epochs: 0}
train: {epochs: 4, log_every: 1, diagnose_every: 100, knn_every: 0}
checkpoint: {every_steps: 4}
tracking: {name: none}
"""  # 24 steps


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("data") / "shards", 100, 16, num_shards=3)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, shards: Manifest) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE + "name: small\nlaunch: {workers: 2}\n")
    return path


def command(recipe: Path, shards: Manifest, run_dir: Path, launcher: str, *more: str) -> list[str]:
    start = [sys.executable, "-m"]
    if launcher == "torchrun":
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module"]
    train = [
        "clae_dist",
        "train",
        str(recipe),
        f"data.shards={shards.folder}",
        f"run_dir={run_dir}",
        *more,
        "--launcher",
        launcher,
    ]
    return [*start, *train]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_outlives_whoever_reads_what_it_says(workers: int, recipe: Path, shards: Manifest, tmp_path: Path) -> None:
    """`clae train … | tee log`, where tee dies first; and a log on a disk that is full."""
    line = command(recipe, shards, tmp_path / "run", "local", f"launch.workers={workers}", "train.epochs=1")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(300) == OK
    assert "finished: 6 steps" in (tmp_path / "run" / "console.log").read_text()
    with Path("/dev/full").open("w") as full:
        elsewhere = [word.replace(f"run_dir={tmp_path}/run", f"run_dir={tmp_path}/other") for word in line]
        done = subprocess.run(elsewhere, stdout=full, stderr=full, env=environment, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == OK
    assert "finished: 6 steps" in (tmp_path / "other" / "console.log").read_text()


@contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The process, in a session of its own; whatever is left of it is killed at the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        for member in family:
            member.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """What the process has said, up to the first line that holds `words`."""
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if words in line:
            return said
    pytest.fail(f"the run ended before {words!r}:\n{said}")


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    assert process.stdout is not None
    rest = process.stdout.read()
    return process.wait(), rest


def run(arguments: list[str]) -> str:
    """The console of a run that must finish."""
    with started(arguments) as process:
        code, said = finish(process)
    assert code == OK, said
    assert "finished: 24 steps" in said
    return said


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(run_dir, pytest.fail)
    assert checkpoint is not None
    assert checkpoint.step == 24
    return dict(checkpoint.state()["model"])


def assert_bitwise(run_dir: Path, other: Path) -> None:
    found, wanted = weights(run_dir), weights(other)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes below a launcher: Ray's workers, or what its fork server has forked."""
    below = psutil.Process(process.pid).children(recursive=True)
    servers = [one for one in psutil.Process(process.pid).children() if "multiprocessing.forkserver" in _command_of(one)]
    forked = [child for server in servers for child in server.children()]
    return forked or [child for child in below if "RayTrainWorker" in _command_of(child)]


def _command_of(process: psutil.Process) -> str:
    """The command line; empty for a process that has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, recipe: Path, shards: Manifest) -> Path:
    """The folder of a local run on two ranks that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run(command(recipe, shards, run_dir, "local"))
    return run_dir


@pytest.mark.slow
def test_torchrun_trains_to_the_same_bits(recipe: Path, shards: Manifest, tmp_path: Path, undisturbed: Path) -> None:
    run(command(recipe, shards, tmp_path / "run", "torchrun"))
    assert_bitwise(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(("launcher", "workers"), [("local", 0), pytest.param("ray", 1, marks=pytest.mark.slow)])
def test_kill_minus_9_of_a_rank_then_the_same_command_again(
    launcher: str, workers: int, recipe: Path, shards: Manifest, tmp_path: Path, undisturbed: Path
) -> None:
    arguments = command(recipe, shards, tmp_path / "run", launcher, "launch.max_failures=0", f"data.workers={workers}")
    with started(arguments) as process:
        read_until(process, "step 10/24")
        ranks = ranks_of(process)
        assert len(ranks) == 2
        ranks[1].kill()
        code, said = finish(process)
    assert code == FAILED, said
    assert "was killed by SIGKILL" in said or "ray" in launcher, said
    assert "The same command resumes from the newest checkpoint" in said
    assert len(said.splitlines()) < 12, said  # readable
    assert 4 <= int(RunFolder(tmp_path / "run").find_checkpoints()[0].name.removeprefix("step-")) < 24
    assert "resuming after step" in run(arguments)
    assert_bitwise(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=pytest.mark.long)])
def test_a_killed_rank_is_started_again_by_itself(
    launcher: str, recipe: Path, shards: Manifest, tmp_path: Path, undisturbed: Path
) -> None:
    with started(command(recipe, shards, tmp_path / "run", launcher)) as process:
        read_until(process, "step 10/24")
        ranks_of(process)[0].kill()
        code, said = finish(process)
    assert code == OK, said
    assert "resuming after step" in said
    assert launcher == "ray" or "rank 0 of 2 was killed by SIGKILL. Starting again (failure 1 of 3)." in said
    assert_bitwise(tmp_path / "run", undisturbed)
    times = account(read_lines(tmp_path / "run"))
    assert sum(times.shares.values()) == pytest.approx(100)
    assert (times.starts, account(read_lines(undisturbed)).spent["lost"]) == (2, 0)
    assert min(times.spent[kind] for kind in ("training", "starting", "data", "checkpoint", "idle")) > 0
    assert times.describe() in said  # what the console says is what the file holds


@pytest.mark.parametrize(
    ("launcher", "how"),
    [
        pytest.param("local", "Ctrl-C", marks=pytest.mark.slow),
        pytest.param("local", "SIGTERM to all", marks=pytest.mark.slow),
        pytest.param("local", "SIGUSR1", marks=pytest.mark.long),
        pytest.param("ray", "Ctrl-C", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_leaves(
    launcher: str, how: str, recipe: Path, shards: Manifest, tmp_path: Path, undisturbed: Path
) -> None:
    """checkpoint.every_steps is 1000 here: the checkpoint is the one that the signal asked for.

    Ctrl-C reaches every process of a terminal, and Slurm's SIGTERM every one of a job, loaders too; a rank took the launcher's
    copy of it for a second one.
    """
    arguments = command(recipe, shards, tmp_path / "run", launcher, "checkpoint.every_steps=1000", "data.workers=1")
    with started(arguments) as process:
        read_until(process, "step  5/24")
        if how == "SIGUSR1":
            process.send_signal(signal.SIGUSR1)
        else:
            os.killpg(process.pid, signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
        code, said = finish(process)
    assert code == STOPPED, said
    assert "saved. The same command resumes from there." in said
    if launcher == "local":  # which hands on SIGTERM, whatever it was sent
        assert f"({how.split()[0]})" in said
    (checkpoint,) = RunFolder(tmp_path / "run").find_checkpoints()
    assert 5 <= int(checkpoint.name.removeprefix("step-")) < 24
    run(arguments)
    assert_bitwise(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("early", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["no rank yet", "ranks start"])
def test_a_signal_before_training_ends_with_the_code_for_another_start(
    early: bool, recipe: Path, shards: Manifest, tmp_path: Path
) -> None:
    """Neither the launcher nor its ranks listen to the run's own handlers yet: both would die of it."""
    with started(command(recipe, shards, tmp_path / "run", "local")) as process:
        deadline = time.monotonic() + 60
        while not (_handles(process.pid, signal.SIGTERM) if early else len(ranks_of(process)) == 2):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        code, said = finish(process)
    assert code == STOPPED, said
    assert "The same command resumes" in said or "the same command starts it" in said
    assert len(said.splitlines()) < 5, said


def _handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for the signal."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(fields["SigCgt"], 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_no_rank_outlives_a_launcher_that_was_killed(recipe: Path, shards: Manifest, tmp_path: Path) -> None:
    with started(command(recipe, shards, tmp_path / "run", "local")) as process:
        read_until(process, "step  5/24")
        ranks = ranks_of(process)
        process.kill()
        gone, alive = psutil.wait_procs(ranks, timeout=60)
    assert len(gone) == 2
    assert alive == []
