"""train.profile_steps: traces of a window of steps."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest

from clae_dist.config import Config, Train
from clae_dist.data.manifest import Manifest
from clae_dist.errors import ConfigError
from clae_dist.recipe import Recipe
from clae_dist.runs.folder import RunFolder
from clae_dist.training.train import train
from clae_dist.world import World
from tests.ranks import RankPool
from tests.training.disturbed import BARE, STEPS, recipe, train_on

PHASES = {f"clae: {name}" for name in ("data", "augmentation", "forward", "attack", "backward", "update")}


def said(world: World, config: Config) -> str:
    console = io.StringIO()
    train(Recipe(config), world, console)
    return console.getvalue()


def names(path: Path) -> list[str]:
    with gzip.open(path) as trace:
        return [event.get("name", "") for event in json.load(trace)["traceEvents"]]


@pytest.mark.slow
def test_each_rank_writes_a_trace_with_the_phases(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    config = recipe(shards, tmp_path / "run", epochs=0.75, profile_steps="1:3", **BARE)
    console = ranks.run(2, said, config)[0]
    assert "profiling steps 2 to 3" in console
    assert "traces of 2 ranks" in console
    assert "ui.perfetto.dev" in console
    traces = sorted(RunFolder(config.folder).profile.iterdir())
    assert [path.name for path in traces] == [f"steps-2-3.rank-{rank}.json.gz" for rank in range(2)]
    for path in traces:
        found = names(path)
        assert set(found) >= PHASES
        assert found.count("clae: update") == 2  # steps
    # A start of the finished run, and one after the window, trace nothing.
    assert "profiling" not in ranks.run(2, said, config)[0]


@pytest.mark.slow
def test_a_start_inside_the_window_traces_the_rest(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    config = recipe(shards, tmp_path / "run", profile_steps=f"1:{STEPS}", **BARE)
    assert ranks.run(1, train_on, config, 6) == ["lost"]
    assert not RunFolder(config.folder).profile.exists()
    assert "profiling steps 4 to 8" in ranks.run(1, said, config)[0]  # a checkpoint is of step 3
    (path,) = RunFolder(config.folder).profile.iterdir()
    assert names(path).count("clae: update") == STEPS - 3


def test_a_trace_that_cannot_be_written_ends_no_run(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    config = recipe(shards, tmp_path / "run", profile_steps="1:9", epochs=0.75, **BARE)
    config.folder.mkdir()
    RunFolder(config.folder).profile.write_text("a file where the folder would be")
    console = ranks.run(1, said, config)[0]
    assert "traces could not be written" in console
    assert "profiling steps 2 to 3" in console
    assert "finished: 3 steps" in console


def test_a_window_after_the_end(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    config = recipe(shards, tmp_path / "run", profile_steps="3:5", epochs=0.75, **BARE)
    assert "train.profile_steps is 3:5, but the run has 3 steps: no trace" in ranks.run(1, said, config)[0]


@pytest.mark.parametrize("steps", ["20", "25:20", "20:20", "1:1000", "-1:3", "a:b"])
def test_windows_that_are_none(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.profile_steps is .*; use FIRST:LAST with at most 100 steps, such as 20:25"):
        Train(profile_steps=steps)
