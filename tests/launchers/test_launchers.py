"""Runs as users start them, killed and stopped from outside. Whatever happens, they end with the same bits.

Nothing here waits by the clock: the console is read line by line until the run is where it should be disturbed.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from clae_dist.data.manifest import Manifest
from clae_dist.errors import FAILED, OK, STOPPED
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.goodput import account, read_lines
from tests import processes
from tests.processes import CLAE, TORCHRUN, Process, finish, read_until, started
from tests.small_run import Undisturbed, assert_same_weights, write_recipe

START = {"local": CLAE, "ray": CLAE, "torchrun": TORCHRUN}


def command(recipe: Path, run_dir: Path, launcher: str, *more: str) -> list[str]:
    settings = [f"run_dir={run_dir}", *more, "--launcher", launcher]
    return [*START[launcher], "train", str(recipe), *settings]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_outlives_a_full_disk_for_its_output(workers: int, recipe: Path, tmp_path: Path) -> None:
    line = command(recipe, tmp_path / "run", "local", f"launch.workers={workers}", "train.epochs=1")
    with Path("/dev/full").open("w") as full:
        assert processes.run(*line, capture_output=False, stdout=full, stderr=full).returncode == OK
    assert "finished: 4 steps" in (tmp_path / "run" / "console.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_outlives_the_reader_of_its_output(workers: int, recipe: Path, tmp_path: Path) -> None:
    """`clae train … | tee log`, where tee dies first."""
    line = command(recipe, tmp_path / "run", "local", f"launch.workers={workers}", "train.epochs=1")
    with started(*line) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(300) == OK
    assert "finished: 4 steps" in (tmp_path / "run" / "console.log").read_text()


def run(arguments: list[str]) -> str:
    """The console of a run that must finish."""
    with started(*arguments) as process:
        code, said = finish(process)
    assert code == OK, said
    assert "finished: 24 steps" in said
    return said


def ranks_of(process: Process) -> list[psutil.Process]:
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


@pytest.mark.slow
def test_torchrun_trains_to_the_same_bits(recipe: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    run(command(recipe, tmp_path / "run", "torchrun"))
    assert_same_weights(tmp_path / "run", undisturbed(2))


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "workers"), [("local", 0), ("ray", 1)])
def test_kill_minus_9_of_a_rank_then_the_same_command_again(
    launcher: str, workers: int, recipe: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    arguments = command(recipe, tmp_path / "run", launcher, "launch.max_failures=0", f"data.workers={workers}")
    with started(*arguments) as process:
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
    assert_same_weights(tmp_path / "run", undisturbed(2))


@pytest.mark.slow
def test_torchrun_extends_a_finished_run_and_mlflow_knows_its_parent(shards: Manifest, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    recipe, uri = write_recipe(tmp_path, shards), f"sqlite:///{tmp_path / 'mlflow.db'}"
    parent = command(recipe, tmp_path / "parent", "local", "train.epochs=2", "tracking.name=mlflow", f"tracking.uri={uri}")
    with started(*parent) as process:
        code, said = finish(process)
    assert code == OK, said
    copies = [tmp_path / launcher for launcher in ("torchrun", "local")]
    for child in copies:
        extended = [f"run_dir={child}", "--extend", "epochs=3", "--launcher", child.name]
        with started(*START[child.name], "train", str(tmp_path / "parent"), *extended) as process:
            code, said = finish(process)
        assert code == OK, said
        assert "continuing" in said
    assert_same_weights(*copies, steps=12)
    client = mlflow.MlflowClient(uri)
    (experiment,) = [one for one in client.search_experiments() if one.name != "Default"]
    tags = {one.info.run_name: one.data.tags for one in client.search_runs([experiment.experiment_id])}
    for child in copies:
        assert tags[child.name]["parent_run_key"] == RunFolder(tmp_path / "parent").read_identity().run_key


@pytest.mark.parametrize(
    "launcher", [pytest.param("local", marks=pytest.mark.slow), pytest.param("ray", marks=pytest.mark.long)]
)
def test_a_killed_rank_is_started_again_by_itself(
    launcher: str, recipe: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    with started(*command(recipe, tmp_path / "run", launcher)) as process:
        read_until(process, "step 10/24")
        ranks_of(process)[0].kill()
        code, said = finish(process)
    assert code == OK, said
    assert "resuming after step" in said
    assert launcher == "ray" or "rank 0 of 2 was killed by SIGKILL. Starting again (failure 1 of 3)." in said
    assert_same_weights(tmp_path / "run", undisturbed(2))
    times = account(read_lines(tmp_path / "run"))
    assert sum(times.shares.values()) == pytest.approx(100)
    assert (times.starts, account(read_lines(undisturbed(2))).spent["lost"]) == (2, 0)
    assert min(times.spent[kind] for kind in ("training", "starting", "data", "checkpoint", "idle")) > 0
    (console,) = [line for line in said.splitlines() if line.startswith("goodput")][-1:]
    assert re.sub(r"[\d.]+", "#", console) == re.sub(r"[\d.]+", "#", times.describe())
    for of_console, of_file in zip(*(re.findall(r"[\d.]+(?= %)", text) for text in (console, times.describe())), strict=True):
        assert float(of_console) == pytest.approx(float(of_file), abs=0.11)  # the file has milliseconds


@pytest.mark.parametrize(
    ("launcher", "how"),
    [
        pytest.param("local", "Ctrl-C", marks=pytest.mark.slow),
        pytest.param("local", "SIGTERM to all", marks=pytest.mark.slow),
        pytest.param("local", "SIGUSR1", marks=pytest.mark.long),
        pytest.param("ray", "Ctrl-C", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_leaves(launcher: str, how: str, recipe: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    """checkpoint.every_steps is 1000 here: the checkpoint is the one that the signal asked for.

    Ctrl-C reaches every process of a terminal, and Slurm's SIGTERM every one of a job, loaders too; a rank took the launcher's
    copy of it for a second one.
    """
    arguments = command(recipe, tmp_path / "run", launcher, "checkpoint.every_steps=1000", "data.workers=1")
    with started(*arguments) as process:
        read_until(process, "step 5/24")
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
    assert_same_weights(tmp_path / "run", undisturbed(2))


@pytest.mark.parametrize("early", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["no rank yet", "ranks start"])
def test_a_signal_before_training_ends_with_the_code_for_another_start(early: bool, recipe: Path, tmp_path: Path) -> None:
    """Neither the launcher nor its ranks listen to the run's own handlers yet: both would die of it."""
    with started(*command(recipe, tmp_path / "run", "local")) as process:
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
def test_no_rank_outlives_a_launcher_that_was_killed(recipe: Path, tmp_path: Path) -> None:
    with started(*command(recipe, tmp_path / "run", "local")) as process:
        read_until(process, "step 5/24")
        ranks = ranks_of(process)
        process.kill()
        gone, alive = psutil.wait_procs(ranks, timeout=60)
    assert len(gone) == 2
    assert alive == []
