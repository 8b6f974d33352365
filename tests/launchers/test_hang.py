"""Ranks that stop answering, on purpose, in real processes: found in time, named, started again, to the same bits."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clae_dist.config import Config, Guard, Launch
from clae_dist.data.manifest import Manifest
from clae_dist.errors import HUNG, OK
from clae_dist.launchers import local
from clae_dist.launchers.rank import Ending
from clae_dist.recipe import Recipe
from clae_dist.runs.folder import RunFolder
from clae_dist.training import train as training
from tests.small_run import Undisturbed, assert_same_weights, whole_run

HANG_S = 8.0


def hanging_run(shards: Manifest, run_dir: Path, **launch: Any) -> Config:
    """Its folder is there."""
    run_dir.mkdir()
    return whole_run(shards, run_dir, sections={"launch": Launch(workers=2, **launch), "guard": Guard(hang_s=HANG_S)})


def _rank(recipe: Recipe, debug: bool, how: str = "") -> Ending:
    """A rank; number 1 hangs in step 6, or as soon after it as a checkpoint is there, once in the life of a run."""
    import torch._dynamo  # noqa: F401  (what an optimiser does first takes seconds on a busy machine)

    mark = recipe.config.folder / "has-hung"
    if os.environ["RANK"] == "1" and how and not mark.exists():
        _hang_from(6, how, mark, RunFolder(recipe.config.folder))
    return local._train(recipe, debug)


def _hang_from(step: int, how: str, mark: Path, folder: RunFolder) -> None:
    step_before, load = training.pretrain_step, training.load
    count = 0

    def hang() -> None:
        mark.write_text(str(time.time()))
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            threading.Event().wait()

    def pretrain_step(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        now = count >= step and folder.find_checkpoints()
        if now and how == "stopped":
            hang()
        if now and how == "collective":
            mark.write_text(str(time.time()))
            dist.recv(torch.zeros(1), src=0, tag=7)  # that rank 0 never sends
        return step_before(*arguments)

    def batches(*arguments: Any) -> Iterator[Any]:
        for number, batch in enumerate(load(*arguments)):
            if number >= step and folder.find_checkpoints():
                hang()
            yield batch

    training.pretrain_step = pretrain_step
    if how == "data":
        training.load = batches


def stopped(*arguments: Any) -> Ending:
    return _rank(*arguments, how="stopped")


def in_data(*arguments: Any) -> Ending:
    return _rank(*arguments, how="data")


def in_a_collective(*arguments: Any) -> Ending:
    return _rank(*arguments, how="collective")


def always_in_data(recipe: Recipe, debug: bool) -> Ending:
    (recipe.config.folder / "has-hung").unlink(missing_ok=True)
    return in_data(recipe, debug)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "cause", "answer"),
    [
        (stopped, "does not answer: stopped, killed or cut off", 1),
        (in_data, "waits for data, which the loader does not give", 2),
        (in_a_collective, "where no other rank comes; rank 0 on", 2),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_run_goes_on_to_the_same_bits(
    work: Any,
    cause: str,
    answer: int,
    shards: Manifest,
    tmp_path: Path,
    undisturbed: Undisturbed,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = hanging_run(shards, tmp_path / "run")
    assert local.launch(Recipe(config), work=work) == Ending(OK, "")
    said = capfd.readouterr()
    (line,) = [line for line in said.err.splitlines() if "no progress for" in line]
    rank = line.partition("rank 1 on ")[2]
    assert rank.startswith(f"{os.uname().nodename} (process ")
    assert cause in rank
    assert "Starting again (failure 1 of 3)" in said.err
    assert re.search("resuming after step [48]", said.out)
    stacks = {path.name: path for path in (config.folder / "hang").glob("*.txt")}
    assert set(stacks) == {f"rank-{rank:05d}.txt" for rank in range(answer)}
    assert "in heard" in stacks["rank-00000.txt"].read_text() or work is not in_data
    assert "thread MainThread" in stacks["rank-00000.txt"].read_text()
    # hang_s, twice the poll, and what a busy machine adds
    assert stacks["rank-00000.txt"].stat().st_mtime - float((config.folder / "has-hung").read_text()) < 2 * HANG_S
    console = (config.folder / "console.log").read_text()
    assert line.removeprefix("clae: ") in console
    assert "rank 0 on" in console.partition("no progress")[0]  # with its stack
    assert_same_weights(config.folder, undisturbed(2))


@pytest.mark.slow
def test_a_run_that_hangs_again_and_again_ends(shards: Manifest, tmp_path: Path) -> None:
    config = hanging_run(shards, tmp_path / "run", max_failures=0)
    ending = local.launch(Recipe(config), work=always_in_data)
    assert ending.code == HUNG
    assert "The same command resumes from the newest checkpoint" in ending.message
