"""The order of samples is a function: exactly once an epoch, the same for every number of ranks, resumable by arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from clae_dist.data.draws import hashed, permutation, uniforms
from clae_dist.data.order import Order

SIZES = (70, 31, 64, 1, 50, 40)  # 256 samples in uneven shards


def order(
    global_size: int = 16, streams: int = 8, shuffle_shards: int = 2, seed: int = 0, sizes: tuple[int, ...] = SIZES
) -> Order:
    return Order(sizes, global_size, streams, shuffle_shards, seed)


@pytest.mark.parametrize("shuffle_shards", [1, 2, 5, 6, 100])
@pytest.mark.parametrize("epoch", [0, 1, 10**8])  # far into a run as at its beginning: nothing comes before
def test_every_sample_exactly_once_an_epoch(shuffle_shards: int, epoch: int) -> None:
    o = order(shuffle_shards=shuffle_shards)
    steps = range(epoch * o.steps_per_epoch, (epoch + 1) * o.steps_per_epoch)
    ids = np.concatenate([o.batch(step).ids for step in steps])
    assert o.steps_per_epoch == 16
    assert sorted(ids) == list(range(256))


def test_what_does_not_fill_a_batch_sits_out_and_others_do_next_epoch() -> None:
    o = order(global_size=24, streams=12)
    assert o.steps_per_epoch == 10  # 240 of 256
    left_out = []
    for epoch in range(3):
        ids = np.concatenate([o.batch(epoch * 10 + t).ids for t in range(10)])
        assert len(set(ids)) == 240
        left_out.append(set(range(256)) - set(ids.tolist()))
    assert left_out[0] != left_out[1] != left_out[2]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_global_batches_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    o = order()
    for step in (0, 5, 16, 40):
        parts = [order().batch(step, rank, world_size).ids for rank in range(world_size)]
        assert all(len(part) == 16 // world_size for part in parts)
        assert np.array_equal(np.concatenate(parts), o.batch(step).ids)  # not only the same set: the same rows


def test_shard_and_row_belong_to_the_id() -> None:
    o = order()
    first = np.concatenate([[0], np.cumsum(SIZES)])
    for step in range(32):
        places = o.batch(step)
        assert np.array_equal(first[places.shards] + places.rows, places.ids)
        assert (places.rows < np.array(SIZES)[places.shards]).all()


def test_epochs_and_seeds_differ() -> None:
    o = order()
    assert not np.array_equal(o.batch(0).ids, o.batch(o.steps_per_epoch).ids)
    assert not np.array_equal(o.batch(0).ids, order(seed=1).batch(0).ids)


def test_shuffling_mixes_the_shards_of_a_block() -> None:
    """A shuffle that left samples in their order would keep neighbours together."""
    o = order(shuffle_shards=6)
    ids = o.at(0, np.arange(256)).ids
    neighbours = np.mean(np.diff(ids) == 1)
    assert neighbours < 0.05


def test_draws_are_fixed_for_ever() -> None:
    """Numbers written down once: a run that goes on under a later version must draw what it drew."""
    assert hashed(1, 2, 3).tolist() == [GOLDEN_HASH]
    assert permutation(8, 5, 0, 1).tolist() == GOLDEN_PERMUTATION
    assert uniforms(2, 0, np.array([4]))[0].tolist() == pytest.approx(GOLDEN_UNIFORMS, abs=1e-15)


GOLDEN_HASH = 6454368144405234654
GOLDEN_PERMUTATION = [0, 1, 6, 5, 7, 2, 4, 3]
GOLDEN_UNIFORMS = [0.9824584550813573, 0.12667205707022888]


def test_draws_are_uniform_and_independent() -> None:
    u = uniforms(16, 0, 2, 0, np.arange(20_000))
    assert abs(u.mean() - 0.5) < 0.002  # 320,000 numbers: six standard errors
    assert abs(u.var() - 1 / 12) < 0.001
    correlation = np.corrcoef(u.T) - np.eye(16)
    assert np.abs(correlation).max() < 0.035  # 20,000 pairs, 120 of them: five standard errors
    assert np.abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.035
