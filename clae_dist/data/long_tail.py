"""A long-tailed part of a labelled set: a pure function of its index, the imbalance and the seed.

Class c of C, in the order of `classes`, keeps its images times imbalance^(-c / (C - 1)), rounded down, but at least one: the
first class all, the last a share of 1 / imbalance. Images without a label are not part of it. The part is a set like any other,
whose shards have fewer samples, so that order, resuming and prefetching know nothing of it.

Reference: Cui et al. 2019, Class-balanced loss based on effective number of samples (CIFAR-LT).
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import IO

import numpy as np

from clae_dist.data.draws import hashed
from clae_dist.data.manifest import Manifest, Shard, content_digest
from clae_dist.data.remote import MAX_OPEN
from clae_dist.errors import DataError


def tail_counts(counts: Sequence[int], imbalance: float) -> list[int]:
    """Images that each class keeps of its `counts`."""
    last = max(1, len(counts) - 1)
    return [max(1, int(count * imbalance ** (-c / last) + 1e-9)) if count else 0 for c, count in enumerate(counts)]


@dataclass(frozen=True)
class TailFiles:
    """The files of `whole`, of whose shards only `rows` are samples."""

    whole: Manifest
    rows: dict[str, np.ndarray] = field(repr=False)  # by the name of the shard, ascending
    records: dict[str, Shard] = field(repr=False)  # the shards of the whole

    @property
    def where(self) -> str:
        return self.whole.where

    @property
    def any_remote(self) -> bool:
        return self.whole.files is not None and self.whole.files.any_remote

    def max_open(self, shard_bytes: Sequence[int], processes: int) -> int:
        return self.whole.files.max_open(shard_bytes, processes) if self.whole.files else MAX_OPEN

    def open(self, shard: Shard, stop: threading.Event | None = None) -> IO[bytes]:
        """Open the shard. Raises the errors of the whole set."""
        record = self.records[shard.name]
        return self.whole.files.open(record, stop) if self.whole.files else self.whole.open(record)

    def open_index(self, shard: Shard) -> IO[bytes]:
        """The index of the samples that are part of the set."""
        file = io.BytesIO()
        np.save(file, self.whole.index(self.records[shard.name])[self.rows[shard.name]])
        file.seek(0)
        return file

    def describe(self) -> str:
        return self.whole.files.describe() if self.whole.files else "all on this machine"


def long_tail(whole: Manifest, split: str, imbalance: float, seed: int) -> Manifest:
    """The set with the long-tailed part of `split` alone. Reads the index of all its shards. Raises DataError."""
    shards = whole.shards(split)
    labels = [whole.index(shard)[:, 2] for shard in shards]
    every = np.concatenate(labels)
    if not (every >= 0).any():
        raise DataError(
            f"data.long_tail is {imbalance:g}, but no image of split {split!r} of {whole.where} has a label (-1 in its index); "
            "prepare the images from one folder a class, or remove data.long_tail."
        )
    counts = tail_counts(np.bincount(every[every >= 0], minlength=len(whole.classes)).tolist(), imbalance)
    kept = np.zeros(len(every), bool)
    for label, count in enumerate(counts):
        ids = np.flatnonzero(every == label)
        kept[ids[np.argsort(hashed(seed, 3, ids), kind="stable")[:count]]] = True
    by_shard = np.split(kept, np.cumsum([len(one) for one in labels])[:-1])
    found = {shard.name: np.flatnonzero(one) for shard, one in zip(shards, by_shard, strict=True) if one.any()}
    part = tuple(replace(shard, samples=len(found[shard.name])) for shard in shards if shard.name in found)
    drawn = {"long_tail": [whole.digest, split, imbalance, seed]}
    return replace(
        whole,
        name=f"{whole.name}, long tail of imbalance {imbalance:g}",
        splits={split: part},
        class_counts={split: tuple(counts)},
        preparation=drawn,
        digest=content_digest(drawn),
        files=TailFiles(whole, found, {shard.name: shard for shard in shards}),
    )
