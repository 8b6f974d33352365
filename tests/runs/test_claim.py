"""Two commands for one run folder: the second is refused before it has touched anything, on every rank."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from clae_dist.config import Checkpointing, Config, Launch, Train
from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import OK, ConfigError
from clae_dist.launchers import start
from clae_dist.lease import hold
from clae_dist.recipe import Recipe
from clae_dist.runs.folder import EVALUATION_LEASE, STOP_FILE, TRAINING_LEASE
from clae_dist.training.finish import Request, evaluate
from clae_dist.training.train import train
from clae_dist.world import World
from tests import processes
from tests.ranks import RankPool
from tests.small_run import small_run

HELD = rf"is in use by another command on host .*, process {os.getpid()}, since"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("data") / "shards", 48, 16)


def recipe(shards: Manifest, run_dir: Path) -> Config:
    settings = Train(epochs=1, log_every=1, diagnose_every=100, knn_every=0, threads=1)
    return small_run(shards.folder, run_dir, train=settings, checkpoint=Checkpointing(), launch=Launch(workers=1))


@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_second_training_is_refused_before_it_has_done_anything(launcher: str, shards: Manifest, tmp_path: Path) -> None:
    config = recipe(shards, tmp_path / "run")
    config.folder.mkdir()
    (config.folder / STOP_FILE).write_text("asked of the first")
    with hold(config.folder / TRAINING_LEASE, "another command", ConfigError, ""):
        before = {path.name: path.read_bytes() for path in config.folder.iterdir() if path.name != TRAINING_LEASE}
        with pytest.raises(ConfigError, match=HELD):
            start(Recipe(replace(config, launch=replace(config.launch, launcher=launcher))))
        assert {path.name: path.read_bytes() for path in config.folder.iterdir() if path.name != TRAINING_LEASE} == before


def refused(world: World, config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        train(Recipe(config), world)
    return str(error.value)


def test_all_ranks_are_refused_alike(shards: Manifest, tmp_path: Path, ranks: RankPool) -> None:
    """As under torchrun, where each rank is a command of its own."""
    config = recipe(shards, tmp_path / "run")
    config.folder.mkdir()
    with hold(config.folder / TRAINING_LEASE, "another command", ConfigError, ""):
        said = ranks.run(2, refused, config)
    assert said[0] == said[1]
    assert f"process {os.getpid()}" in said[0]


def test_a_run_whose_process_was_killed_resumes_at_once(shards: Manifest, tmp_path: Path) -> None:
    config = recipe(shards, tmp_path / "run")
    config.folder.mkdir()
    path = config.folder / TRAINING_LEASE
    script = (
        "import os, sys, pathlib\nfrom clae_dist.lease import hold\n"
        "with hold(pathlib.Path(sys.argv[1]), 'clae train', SystemExit, ''): os.kill(os.getpid(), 9)"
    )
    killed = processes.run(sys.executable, "-c", script, path)
    assert killed.returncode == -signal.SIGKILL
    assert path.exists()
    assert start(Recipe(config)).code == OK
    assert not path.exists()
    with hold(config.folder / EVALUATION_LEASE, "another command", ConfigError, ""), pytest.raises(ConfigError, match=HELD):
        evaluate(Request(str(config.folder)))
    assert not (config.folder / "evaluation.json").exists()
