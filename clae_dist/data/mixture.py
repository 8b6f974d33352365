"""The order of several sets at fixed shares: a pure function of (seed, step) without state, like order.py.

Sample n of the run (n = t·N + slot in global batch t) belongs to one set and is that set's sample number c(n), where c counts
the samples of that set before n: the integer part of n times its share. So the first n samples have the shares to within a
sample or two, and every batch nearly so. Each set is passed through repeatedly, each pass in an order of its own and without
skipping an image. Ranks take neighbouring slots, so global batch t does not depend on their number.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import IO

import numpy as np

from clae_dist.data.classes import one_spelling, places_of
from clae_dist.data.manifest import Manifest, Shard, content_digest
from clae_dist.data.order import Order, Places
from clae_dist.data.remote import MAX_OPEN


class MixedOrder:
    """`shard_sizes` and share of each set; shares add up to 1. Shards and ids are numbered over all sets, in their order.

    An epoch has as many images as all sets together.
    """

    def __init__(
        self, shard_sizes: Sequence[Sequence[int]], shares: Sequence[float], global_size: int, shuffle_shards: int, seed: int
    ) -> None:
        assert len(shard_sizes) == len(shares), (len(shard_sizes), len(shares))
        assert abs(sum(shares) - 1) < 1e-9, shares
        # One stream each, of one sample per batch: a set's own order has no batches that could skip an image.
        self._orders = [Order(sizes, 1, 1, shuffle_shards, seed) for sizes in shard_sizes]
        self._first_shard = np.concatenate([[0], np.cumsum([len(sizes) for sizes in shard_sizes])])
        self._first_id = np.concatenate([[0], np.cumsum([order.num_samples for order in self._orders])])
        self.shares = tuple(shares)
        self.num_samples = int(self._first_id[-1])
        self.global_size = global_size
        self.steps_per_epoch = self.num_samples // global_size

    def counts(self, n: np.ndarray) -> np.ndarray:
        """(sets, len(n)): number of samples of each set among the first n of the run. They add up to n."""
        left, rest = n.astype(np.int64), 1.0
        found = []
        for share in self.shares[:0:-1]:
            taken = np.floor(left * (share / rest)).astype(np.int64)
            found.append(taken)
            left, rest = left - taken, rest - share
        return np.stack([left, *found[::-1]])

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Places:
        """This rank's share of global batch `step`."""
        rows = self.global_size // world_size
        n = step * self.global_size + rank * rows + np.arange(rows + 1)
        before = self.counts(n)
        which = np.diff(before, axis=1).argmax(0)  # the set whose count grows
        number = before[which, np.arange(rows)]
        epochs, shards, row_of, ids = (np.zeros(rows, np.int64) for _ in range(4))
        for index, order in enumerate(self._orders):
            mine = which == index
            for epoch in np.unique(number[mine] // order.num_samples):
                chosen = mine & (number // order.num_samples == epoch)
                places = order.at(int(epoch), number[chosen] % order.num_samples)
                epochs[chosen] = epoch
                shards[chosen] = places.shards + self._first_shard[index]
                row_of[chosen] = places.rows
                ids[chosen] = places.ids + self._first_id[index]
        return Places(epochs, shards, row_of, ids)

    def shards_needed(self, steps: range, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, int]]:
        """(step, shard) in the order of steps: from `step` on any rank may read `shard`, until its set leaves the block."""
        for step in steps:
            bounds = self.counts(np.array([step * self.global_size, (step + 1) * self.global_size]))
            for index, order in enumerate(self._orders):
                first, last = bounds[index].tolist()
                for shard in order.entered(first, last, beginning=step == steps.start):
                    yield step, shard + int(self._first_shard[index])


@dataclass(frozen=True)
class MixedFiles:
    """The files of several sets as one: `parts` maps each name in the mixture to the set and its own shard."""

    sets: tuple[Manifest, ...]
    shares: tuple[float, ...]
    parts: dict[str, tuple[int, Shard]] = field(repr=False)
    classes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return " and ".join(one.where for one in self.sets)

    def max_open(self, shard_bytes: Sequence[int], processes: int) -> int:
        return min((one.files.max_open(shard_bytes, processes) for one in self.sets if one.files), default=MAX_OPEN)

    @property
    def any_remote(self) -> bool:
        return any(one.files is not None and one.files.any_remote for one in self.sets)

    def open(self, shard: Shard, stop: threading.Event | None = None) -> IO[bytes]:
        """Open the shard of its own set. Raises the errors of that set."""
        number, own = self.parts[shard.name]
        files = self.sets[number].files
        return files.open(own, stop) if files else self.sets[number].open(own)

    def open_index(self, shard: Shard) -> IO[bytes]:
        """The shard's index, with labels as positions in the classes of all sets."""
        number, own = self.parts[shard.name]
        index = self.sets[number].index(own)
        places = places_of(self.sets[number].classes, self.classes)
        ours = np.array([places[name] for name in self.sets[number].classes] + [-1])
        index[:, 2] = ours[index[:, 2]]  # -1, no label, is the last
        file = io.BytesIO()
        np.save(file, index)
        file.seek(0)
        return file

    def describe(self) -> str:
        return "; ".join(one.files.describe() for one in self.sets if one.files) or "all on this machine"


def mix(sets: Sequence[Manifest], shares: Sequence[float], split: str) -> Manifest:
    """Combine one split of several sets, in their order, for MixedOrder. Raises DataError for a set without the split."""
    classes = tuple(sorted(set(one_spelling({name for one in sets for name in one.classes}).values())))
    parts: dict[str, tuple[int, Shard]] = {}
    shards = []
    for number, one in enumerate(sets):
        for own in one.shards(split):
            name = f"{number}-{one.name}/{own.name}"
            parts[name] = (number, own)
            shards.append(replace(own, name=name))
    files = MixedFiles(tuple(sets), tuple(shares), parts, classes)
    digests = [[one.digest, share] for one, share in zip(sets, shares, strict=True)]
    return Manifest(
        folder=sets[0].folder,
        name=" + ".join(f"{share:.3g} {one.name}" for one, share in zip(sets, shares, strict=True)),
        source="; ".join(dict.fromkeys(one.source for one in sets)),
        licence="; ".join(dict.fromkeys(one.licence for one in sets)),
        created=max(one.created for one in sets),
        classes=classes,
        splits={split: tuple(shards)},
        quarantined=sum(one.quarantined for one in sets),
        preparation={"mixture": digests},
        digest=content_digest({"mixture": digests}),
        files=files,
    )
