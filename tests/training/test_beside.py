"""The next batch is fetched beside the step on GPUs: here on CPU ranks, where such a run must not differ from one without."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clae_dist.bench.measure import replaced
from clae_dist.config import Config
from clae_dist.data.loader import LoadedBatch
from clae_dist.data.manifest import Manifest
from clae_dist.errors import DataError
from clae_dist.recipe import Recipe
from clae_dist.runs.folder import STOP_FILE, RunFolder, step_of
from clae_dist.training import train as training
from clae_dist.world import World
from tests.ranks import RankPool
from tests.training.disturbed import assert_bitwise, final, logged, recipe, train_on

FinishedRun = Callable[[int], Config]


def beside(world: World, config: Config, where: dict[str, int]) -> str:
    with replaced(training._Loop, fetches_beside=True):
        return train_on(world, config, **where)


@pytest.mark.parametrize(
    ("where", "status"),
    [
        pytest.param({"stop_at": 4}, "stopped", id="stopped"),
        pytest.param({"lose_at": 6}, "lost", id="lost", marks=pytest.mark.slow),
    ],
)
def test_the_same_bits_as_without(
    ranks: RankPool, finished_run: FinishedRun, shards: Manifest, tmp_path: Path, where: dict[str, int], status: str
) -> None:
    plain, other = finished_run(2), recipe(shards, tmp_path / "beside")
    assert ranks.run(2, beside, other, where) == [status] * 2
    (other.folder / STOP_FILE).unlink(missing_ok=True)
    assert ranks.run(2, beside, other, {}) == ["finished"] * 2
    assert_bitwise(final(other), final(plain))
    losses = [{line["step"]: line["loss"] for line in logged(run) if "loss" in line} for run in (plain, other)]
    assert losses[0] == losses[1]


def broken_batch(world: World, config: Config, at: int) -> str:
    """Train; rank 1 cannot read the batch of step `at`. Returns the error."""
    real, count = training.next_batch, 0

    def next_batch(batches: Iterator[LoadedBatch], *arguments: Any) -> Any:
        nonlocal count
        count += 1
        batch, problem = real(batches, *arguments)
        return (None, "shard 7 is gone") if world.rank == 1 and count == at + 1 else (batch, problem)

    with replaced(training, next_batch=next_batch), replaced(training._Loop, fetches_beside=True):
        try:
            return training.train(Recipe(config), world, io.StringIO()).status
        except DataError as error:
            return str(error)


def test_a_batch_that_one_rank_cannot_read_ends_all_after_the_step_before(
    ranks: RankPool, shards: Manifest, tmp_path: Path
) -> None:
    """The step beside which it was fetched is taken and logged, and its checkpoint is committed."""
    config = recipe(shards, tmp_path / "run")
    assert set(ranks.run(2, broken_batch, config, 3)) == {"shard 7 is gone"}
    assert [step_of(path) for path in RunFolder(config.folder).find_checkpoints()] == [3]
