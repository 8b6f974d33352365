"""How far the order is from a uniform shuffle: `python -m tests.data.shuffle_quality` prints the README's table.

A shuffle that reads every sample from anywhere is uniform, and reads at random from the whole set. Ours reads from the blocks
that the streams are in; these figures say what that costs. n samples, N a global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clae_dist.data.order import Order


@dataclass(frozen=True)
class Quality:
    """1 is what a uniform shuffle has, for all of these."""

    neighbours: float  # how often two neighbours in storage share a global batch
    distance: float  # how many batches lie between two neighbours in storage
    shards: float  # different shards in a global batch
    again: float  # how often two samples that shared a batch share one in the next epoch


@dataclass(frozen=True)
class Cost:
    memory_bytes: int  # of one process's order
    open_shards: int  # shards that one rank reads from at a time


def quality(order: Order, shard_sizes: np.ndarray) -> Quality:
    """Measured over the whole epoch 0, and epoch 1 against it."""
    batches, used = order.steps_per_epoch, order.steps_per_epoch * order.global_size
    step_of = [_steps(order, epoch) for epoch in (0, 1)]
    shard_of = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    neighbours = np.flatnonzero((shard_of[1:] == shard_of[:-1]) & (step_of[0][1:] >= 0) & (step_of[0][:-1] >= 0))
    gaps = np.abs(step_of[0][neighbours] - step_of[0][neighbours + 1])
    by_chance = (order.global_size - 1) / (used - 1)

    by_step = np.argsort(step_of[0], kind="stable")[-used:].reshape(batches, order.global_size)
    different = np.mean([len(np.unique(shard_of[ids])) for ids in by_step])
    expected = np.sum(1 - (1 - shard_sizes / shard_sizes.sum()) ** order.global_size)

    together = np.random.default_rng(0).permuted(by_step, axis=1)[:, : order.global_size // 2 * 2].reshape(-1, 2)
    both = step_of[1][together]
    seen = (both >= 0).all(axis=1)
    return Quality(
        neighbours=float(np.mean(gaps == 0) / by_chance),
        distance=float(gaps.mean() / (batches / 3)),
        shards=float(different / expected),
        again=float(np.mean(both[seen, 0] == both[seen, 1]) / by_chance),
    )


def _steps(order: Order, epoch: int) -> np.ndarray:
    """The batch of each sample in an epoch; -1 for those that sit it out."""
    steps = np.full(order.num_samples, -1)
    streams, per_batch = order.streams, order.global_size // order.streams
    length = order.steps_per_epoch * per_batch
    positions = np.arange(streams * length)
    steps[order.at(epoch, positions).ids] = positions % length // per_batch
    return steps


def cost(order: Order, rank: int, world_size: int) -> Cost:
    """Of the middle of epoch 0."""
    order.batch(order.steps_per_epoch // 2, rank, world_size)
    held = order._blocks.values()
    return Cost(sum(a.nbytes + b.nbytes for a, b in held), sum(len(np.unique(shards)) for shards, _ in held))


def main() -> None:
    print("Global batch 4096, rank 3 of 8, shards of 1,000 samples. 1 is a uniform shuffle.")
    print("shards  streams  shuffle_shards  share a batch  apart  shards in a batch  together again   memory  a rank reads")
    for num_shards, streams, choices in ((256, 256, (1, 8)), (2000, 256, (1, 8, 64)), (2000, 16, (1, 8, 64, 512, 2000))):
        sizes = np.full(num_shards, 1000)
        for shuffle_shards in choices:
            order = Order(sizes.tolist(), 4096, streams, shuffle_shards, 0)
            found, price = quality(order, sizes), cost(order, 3, 8)
            print(
                f"{num_shards:6d}  {streams:7d}  {shuffle_shards:14d}  {found.neighbours:13.2f}  {found.distance:5.2f}"
                f"  {found.shards:17.2f}  {found.again:14.2f}"
                f"  {price.memory_bytes / 1e6:4.1f} MB  {price.open_shards:4d} shards"
            )


if __name__ == "__main__":
    main()
