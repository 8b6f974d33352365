"""A signal at any time: all ranks stop together, everything is saved, or they leave in the stated time and say so."""

from __future__ import annotations

import io
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clae_dist.config import Checkpointing, Config, Guard, Launch, Train
from clae_dist.data.manifest import Manifest
from clae_dist.errors import STOPPED
from clae_dist.launchers import local
from clae_dist.launchers.rank import Ending
from clae_dist.recipe import Recipe
from clae_dist.runs.folder import RunFolder
from clae_dist.training import train as training
from clae_dist.training.saving import Saving
from clae_dist.world import World
from tests.ranks import RankPool
from tests.small_run import small_run


def recipe(shards: Manifest, run_dir: Path) -> Config:
    return small_run(
        shards.folder,
        run_dir,
        train=Train(epochs=1, log_every=1, diagnose_every=9, knn_every=0.5, threads=1),
        checkpoint=Checkpointing(every_steps=2),
        launch=Launch(workers=2, max_failures=0),
    )


def signalled(world: World, config: Config, where: str, number: int) -> tuple[str, int, str]:
    """Trains; the first time that rank 1 comes to `where`, it is sent the signal there. Status, step, what was said."""
    holder: Any = Saving if where == "save" else training
    real = getattr(holder, where)
    sent = False

    def then(*arguments: Any, **named: Any) -> Any:
        nonlocal sent
        if world.rank == 1 and not sent:
            sent = True
            os.kill(os.getpid(), number)
        return real(*arguments, **named)

    setattr(holder, where, then)
    said = io.StringIO()
    try:
        outcome = training.train(Recipe(config), world, said)
    finally:
        setattr(holder, where, real)
    return outcome.status, outcome.step, said.getvalue()


def finished(world: World, config: Config) -> str:
    return training.train(Recipe(config), world, io.StringIO()).status


@pytest.mark.parametrize(
    ("where", "number", "step"),
    [
        pytest.param("open_sets", signal.SIGTERM, 0, marks=pytest.mark.slow),
        pytest.param("knn_while_training", signal.SIGINT, 0, marks=pytest.mark.slow),  # before the first step
        ("pretrain_step", signal.SIGUSR1, 1),
        ("save", signal.SIGTERM, 2),
        pytest.param("describe", signal.SIGINT, 0, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_stops_all_with_everything_saved(
    where: str, number: int, step: int, ranks: RankPool, shards: Manifest, tmp_path: Path
) -> None:
    config = recipe(shards, tmp_path / "run")
    found = ranks.run(2, signalled, config, where, number)
    assert [(status, at) for status, at, _ in found] == [("stopped", step)] * 2
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    assert f"stopped after step {step} ({name}); saved." in found[0][2]
    assert "(guard.stop_within_s 60)" in found[0][2]
    assert [path.name for path in RunFolder(config.folder).find_checkpoints()] == ([f"step-0000000{step}"] if step else [])
    assert ranks.run(2, finished, config) == ["finished", "finished"]


def _stuck(recipe: Recipe, debug: bool) -> Ending:
    """Rank 1 is asked to stop in its third step, which does not end."""
    real, count = training.pretrain_step, 0

    def step(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait()
        return real(*arguments)

    training.pretrain_step = step
    return local._train(recipe, debug)


@pytest.mark.slow
def test_what_cannot_stop_in_the_stated_time_leaves_without_saving(
    shards: Manifest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = replace(recipe(shards, tmp_path / "run"), checkpoint=Checkpointing(every_steps=1), guard=Guard(stop_within_s=1.0))
    config.folder.mkdir()
    ending = local.launch(Recipe(config), work=_stuck)
    assert ending.code == STOPPED
    assert "left with nothing new saved. The same command resumes from the newest checkpoint." in ending.message
    line = (
        "rank 1 was asked to stop (SIGTERM) and is still at training, after step 2, 1 s later (guard.stop_within_s); it leaves"
    )
    assert line in capfd.readouterr().err
    assert line in (config.folder / "console.log").read_text()
    assert "and the same command resumes from step-0000000" in (config.folder / "console.log").read_text()
    oldest = RunFolder(config.folder).find_checkpoints()[-1]  # step 2 would be committed in the next step, which never runs
    assert oldest.name == "step-00000001"
