"""The order under random settings and at ten million samples: exact, in bounded memory, as near to uniform as said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from clae_dist.data.order import Order
from tests import processes
from tests.data.shuffle_quality import cost, quality
from tests.data.ten_million import GLOBAL_SIZE, SAMPLES, SHARDS, SHUFFLE_SHARDS, STREAMS, CountedPermutations


@pytest.mark.parametrize("seed", range(60))
def test_any_settings_give_every_sample_once_and_the_same_batches_for_every_world(seed: int) -> None:
    rng = np.random.default_rng(seed)
    print(f"settings drawn with seed {seed}")
    sizes = rng.integers(1, 60, rng.integers(1, 12)).tolist()
    streams = int(rng.choice([1, 2, 3, 4, 6, 8, 12]))
    global_size = streams * int(rng.integers(1, 5))
    if global_size > sum(sizes):
        sizes.append(global_size)
    settings = (sizes, global_size, streams, int(rng.integers(1, 14)), int(rng.integers(0, 2**31)))
    order = Order(*settings)
    epoch = int(rng.choice([0, 1, 7, 10**6]))
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    batches = {step: order.batch(step).ids for step in steps}

    seen = np.concatenate(list(batches.values()))
    assert len(seen) == len(set(seen.tolist())) == sum(sizes) // global_size * global_size
    assert 0 <= seen.min() <= seen.max() < sum(sizes)

    worlds = [size for size in range(1, streams + 1) if streams % size == 0]
    workers = int(rng.integers(1, 4))
    for world_size in worlds:
        for step in rng.choice(list(steps), min(4, len(steps)), replace=False).tolist():
            parts = []
            for rank in range(world_size):
                loader_process = Order(*settings)  # it has seen every `workers`-th step before, and nothing else
                loader_process.batch(max(steps.start, step - workers), rank, world_size)
                parts.append(loader_process.batch(step, rank, world_size).ids)
            assert np.array_equal(np.concatenate(parts), batches[step])


def test_finding_a_batch_takes_the_same_work_after_a_billion_samples_as_at_the_beginning() -> None:
    counted = CountedPermutations()
    try:
        work = []
        for epoch in (0, 100):  # of ten million samples: the second is a billion later
            for t in (0, 1200):
                counted.samples = 0
                order = Order([SAMPLES] * SHARDS, GLOBAL_SIZE, STREAMS, SHUFFLE_SHARDS, seed=3)
                order.batch(epoch * order.steps_per_epoch + t, rank=7, world_size=32)
                work.append(counted.samples)
    finally:
        counted.restore()
    shuffled_blocks = [(samples - SHARDS) / (SHUFFLE_SHARDS * SAMPLES) for samples in work]
    assert all(1 <= blocks <= STREAMS // 32 + 1 for blocks in shuffled_blocks)  # not one block more than its streams are in
    assert work[0] == work[2]
    assert work[1] == work[3]


def test_memory_does_not_grow_with_the_steps() -> None:
    """Guards against a cache of blocks that are never needed again: it grew to 660 MB a loader process."""
    order = Order([50] * 400, 80, 16, 4, 0)
    held = []
    for step in range(3 * order.steps_per_epoch):
        order.batch(step, 1, 4)
        held.append(sum(a.nbytes + b.nbytes for a, b in order._blocks.values()))
    block = 4 * 50 * 8  # bytes: int32 shard and row
    assert max(held) <= 2 * (16 // 4) * block  # a batch may lie in two blocks of each of this rank's streams


def test_the_quality_of_the_shuffle_is_as_documented() -> None:
    sizes = np.full(200, 100)
    alike, mixed, whole = (quality(Order(sizes.tolist(), 400, 8, shards, 0), sizes) for shards in (1, 25, 200))
    assert alike.neighbours > 10  # shard by shard: neighbours share a batch far too often
    assert alike.shards < 0.2
    for found in (mixed, whole):
        assert 0.8 < found.neighbours < 1.2
        assert 0.9 < found.distance < 1.1
        assert 0.95 < found.shards < 1.05
        assert 0.7 < found.again < 1.3
    cheap, dear = (cost(Order(sizes.tolist(), 400, 8, shards, 0), 0, 4) for shards in (1, 200))
    assert cheap.memory_bytes < dear.memory_bytes == 200 * 100 * 8
    assert (cheap.open_shards, dear.open_shards) == (2, 200)


@pytest.mark.slow
def test_ten_million_samples_in_bounded_memory(tmp_path: Path) -> None:
    done = processes.run(sys.executable, "-m", "tests.data.ten_million", tmp_path, timeout=None)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["opened"]["samples"] == 10_000_000
    assert found["same"]
    assert max(found["work"].values()) == min(found["work"].values())
    assert found["mb"]["one rank of 8"] < 150
    assert found["mb"]["with reading"] < 400  # an index of ten million rows would be 240 MB by itself
