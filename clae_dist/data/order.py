"""The order of samples: a pure function from (seed, epoch, position) to (shard, row), without state and I/O.

An epoch shuffles the shards, takes them in blocks of `shuffle_shards`, and shuffles the samples of each block. The first T·N
positions of that sequence (T global batches of N samples) are cut into C equal ranges, the *canonical streams*. Global batch t
takes the next N/C samples of every stream, and a rank owns C/W neighbouring streams. So the images of global batch t and their
order depend neither on the number of ranks nor on loader processes, and resuming is arithmetic. The remaining samples at the
end of the sequence (fewer than N) are skipped in this epoch; they are different ones each epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from clae_dist.data.draws import permutation


@dataclass(frozen=True)
class Places:
    """Positions of the samples of a batch. All arrays have one entry per sample."""

    epochs: np.ndarray  # passes over the sample's set before this one
    shards: np.ndarray  # index of the shard in the split
    rows: np.ndarray  # index of the sample in its shard
    ids: np.ndarray  # index of the sample in the split: the same in every epoch


class Order:
    """The order of `sum(shard_sizes)` samples. Steps are counted from the start of the run, over all epochs."""

    def __init__(self, shard_sizes: Sequence[int], global_size: int, streams: int, shuffle_shards: int, seed: int) -> None:
        assert global_size % streams == 0, (global_size, streams)
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._first_id = np.concatenate([[0], np.cumsum(self._sizes)])
        self.num_samples = int(self._first_id[-1])
        self.global_size = global_size
        self.streams = streams
        self.shuffle_shards = shuffle_shards
        self.seed = seed
        self.steps_per_epoch = self.num_samples // global_size
        self._epoch_layout = lru_cache(2)(self._layout)
        self._blocks: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of this epoch, and the first position of each block of shards."""
        shards = permutation(len(self._sizes), self.seed, epoch, 0)
        ends = np.cumsum(self._sizes[shards])
        return shards, np.concatenate([[0], ends[self.shuffle_shards - 1 :: self.shuffle_shards], ends[-1:]])

    def _shuffled_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row, int32, of every sample of a block of shards, shuffled."""
        shards = self._epoch_layout(epoch)[0][block * self.shuffle_shards : (block + 1) * self.shuffle_shards]
        shard_of = np.repeat(shards.astype(np.int32), self._sizes[shards])
        row_of = np.concatenate([np.arange(self._sizes[shard], dtype=np.int32) for shard in shards])
        order = permutation(len(shard_of), self.seed, epoch, 1 + block)
        return shard_of[order], row_of[order]

    def at(self, epoch: int, positions: np.ndarray) -> Places:
        """The samples at `positions` (0 … num_samples - 1) of an epoch's sequence."""
        _, starts = self._epoch_layout(epoch)
        blocks = np.searchsorted(starts, positions, side="right") - 1
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        keys = [(epoch, block) for block in np.unique(blocks).tolist()]
        # Only the blocks of this call are kept: a stream passes through its blocks once, in order.
        self._blocks = used = {key: self._blocks.get(key) or self._shuffled_block(*key) for key in keys}
        for (_, block), (shard_of, row_of) in used.items():
            chosen = blocks == block
            inside = positions[chosen] - starts[block]
            shards[chosen], rows[chosen] = shard_of[inside], row_of[inside]
        return Places(np.full_like(positions, epoch), shards, rows, self._first_id[shards] + rows)

    def entered(self, first: int, last: int, *, beginning: bool) -> Iterator[int]:
        """Shards of the blocks that samples first … last - 1 (over all epochs) enter; at a `beginning`, also of their first."""
        for epoch in range(first // self.num_samples, -(-last // self.num_samples)):
            shards, starts = self._epoch_layout(epoch)
            low, high = first - epoch * self.num_samples, last - epoch * self.num_samples
            for block, start in enumerate(starts[:-1].tolist()):
                inside = beginning and start < low < int(starts[block + 1])
                if inside or max(0, low) <= start < high:
                    yield from shards[block * self.shuffle_shards : (block + 1) * self.shuffle_shards].tolist()

    def shards_needed(self, steps: range, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, int]]:
        """Yield (step, shard) in the order of steps: this rank may read `shard` from `step` until its stream leaves the block.

        The order of a block's shards within a stream is random, so all of them are needed when the stream enters the block.
        """
        per_batch = self.global_size // self.streams
        for epoch in range(steps.start // self.steps_per_epoch, -(-steps.stop // self.steps_per_epoch)):
            shards, starts = self._epoch_layout(epoch)
            first = max(0, steps.start - epoch * self.steps_per_epoch)
            last = min(self.steps_per_epoch, steps.stop - epoch * self.steps_per_epoch) - 1
            needs: dict[int, int] = {}
            for stream in range(self.streams // world_size * rank, self.streams // world_size * (rank + 1)):
                begin = stream * self.steps_per_epoch * per_batch
                ends = begin + np.array([first * per_batch, (last + 1) * per_batch - 1])
                low, high = (np.searchsorted(starts, ends, side="right") - 1).tolist()
                for block in range(low, high + 1):
                    step = max(first, (int(starts[block]) - begin) // per_batch)
                    for shard in shards[block * self.shuffle_shards : (block + 1) * self.shuffle_shards].tolist():
                        needs[shard] = min(step, needs.get(shard, step))
            for shard, step in sorted(needs.items(), key=lambda need: need[1]):
                yield epoch * self.steps_per_epoch + step, shard

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Places:
        """This rank's share of global batch `step`."""
        assert self.streams % world_size == 0, (self.streams, world_size)
        epoch, t = divmod(step, self.steps_per_epoch)
        per_batch = self.global_size // self.streams
        run_length = self.steps_per_epoch * per_batch
        mine = np.arange(self.streams // world_size) + rank * (self.streams // world_size)
        positions = mine[:, None] * run_length + t * per_batch + np.arange(per_batch)[None, :]
        return self.at(epoch, positions.reshape(-1))
