"""A set of ten million samples, without the images: its order and its batches, in a process whose memory is measured.

`python -m tests.data.ten_million FOLDER` prints JSON. All 2,000 shards are one file under 2,000 names (hard links), and so are
their indexes: the manifest, the offsets and the reading are real, only every image is the same.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from clae_dist.data import order as orders
from clae_dist.data.manifest import Manifest, Shard, load_manifest, write_manifest
from clae_dist.data.order import Order
from clae_dist.data.shards import ShardReader
from clae_dist.data.synthetic import write_synthetic_set

SHARDS, SAMPLES = 2_000, 5_000
GLOBAL_SIZE, STREAMS, SHUFFLE_SHARDS = 4096, 256, 8  # the automatic streams and the default shuffle_shards


def write_set(folder: Path) -> Manifest:
    """2,000 shards of 5,000 samples; a few MB on disk."""
    (one,) = write_synthetic_set(folder / "one", 1, 16).splits["train"]
    place = np.load(folder / "one" / one.index_name)
    np.save(folder / "index.npy", np.repeat(place, SAMPLES, axis=0))
    shards = tuple(Shard(f"train-{number:06d}.tar", SAMPLES, one.bytes, one.sha256, "") for number in range(SHARDS))
    for shard in shards:
        os.link(folder / "one" / one.name, folder / shard.name)
        os.link(folder / "index.npy", folder / shard.index_name)
    return write_manifest(
        folder,
        name="ten million",
        source="made here",
        licence="none needed",
        classes=("one", "two"),
        splits={"train": shards},
        quarantined=0,
        preparation={},
    )


class CountedPermutations:
    """Counts the samples that are put in order: the work of finding a batch."""

    def __init__(self) -> None:
        self.samples = 0
        self._permutation = orders.permutation
        orders.permutation = self  # type: ignore[assignment]

    def __call__(self, length: int, *parts: int) -> np.ndarray:
        self.samples += length
        return self._permutation(length, *parts)

    def restore(self) -> None:
        orders.permutation = self._permutation


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(folder: Path) -> None:
    write_set(folder)
    before, started = peak_mb(), time.process_time()
    manifest = load_manifest(folder)
    reader = ShardReader(manifest, "train")
    opened = {"samples": sum(reader.sizes), "mb": peak_mb() - before, "s": time.process_time() - started}

    counted = CountedPermutations()

    def order() -> Order:
        return Order(reader.sizes, GLOBAL_SIZE, STREAMS, SHUFFLE_SHARDS, seed=1)

    steps = order().steps_per_epoch
    work = {}
    for epoch in (0, 3, 10**9 // sum(reader.sizes), 10**6):
        for t in (0, steps // 2, steps - 1):
            counted.samples = 0
            places = order().batch(epoch * steps + t, 5, 8)  # a fresh order each time: nothing is replayed, nothing known
            work[f"epoch {epoch}, batch {t}"] = counted.samples
            assert len(np.unique(places.ids)) == GLOBAL_SIZE // 8
    one_rank = peak_mb() - before

    same = True
    for step in (0, 3 * steps + steps // 2, 4 * steps - 1):
        whole = order()
        wanted = whole.batch(step).ids
        for world_size in (2, 256):
            found = np.concatenate([whole.batch(step, rank, world_size).ids for rank in range(world_size)])
            same = same and np.array_equal(found, wanted)
    all_ranks = peak_mb() - before

    places = order().batch(3 * steps)
    for shard, row in zip(places.shards[:600].tolist(), places.rows[:600].tolist(), strict=True):
        image, _ = reader.read(shard, row)
        assert image.shape == (3, 16, 16)
    print(
        json.dumps(
            {
                "opened": opened,
                "work": work,
                "same": bool(same),
                "mb": {"one rank of 8": one_rank, "all ranks": all_ranks, "with reading": peak_mb() - before},
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
