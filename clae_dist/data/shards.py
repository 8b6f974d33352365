"""Reading samples by place: memory-mapped shards, the offsets in their index."""

from __future__ import annotations

import mmap
import os
from functools import lru_cache

import numpy as np
import torch

from clae_dist.data.decode import DecodeError, decode_rgb
from clae_dist.data.manifest import DataError, Manifest

_OPEN_SHARDS = 512


class ShardReader:
    """The images of one split, by (shard, row). Opens shards when first read; safe to send to loader processes."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        if split not in manifest.splits:
            raise DataError(f"{manifest.folder} has no split {split!r}; it has {', '.join(sorted(manifest.splits))}.")
        self.manifest = manifest
        self.split = split
        self.sizes = [shard.samples for shard in manifest.splits[split]]
        self._first_id = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self._open = lru_cache(_OPEN_SHARDS)(self._map)

    def __getstate__(self) -> tuple[Manifest, str]:
        return self.manifest, self.split

    def __setstate__(self, state: tuple[Manifest, str]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def _map(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        record = self.manifest.splits[self.split][shard]
        path = self.manifest.folder / record.name
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.bytes:  # before mapping, which refuses an empty file with an error of its own
                raise DataError(
                    f"{path} has {size} bytes, but the manifest says {record.bytes}: it was cut short or changed; "
                    f"`python -m data_prep verify {self.manifest.folder}` says what differs."
                )
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return mapped, self.manifest.index(record)

    def read(self, shard: int, row: int) -> tuple[torch.Tensor, int]:
        """The decoded image, uint8 (3, H, W), and its label (-1: none). Raises DataError, naming shard and row."""
        mapped, index = self._open(shard)
        offset, length, label = index[row].tolist()
        try:
            return decode_rgb(mapped[offset : offset + length]), label
        except DecodeError as error:
            name = self.manifest.splits[self.split][shard].name
            raise DataError(
                f"sample {row} of {name} cannot be decoded ({error}); "
                f"`python -m data_prep verify {self.manifest.folder}` says whether the shard has changed."
            ) from None

    def place(self, sample: int) -> tuple[int, int]:
        """Shard and row of a sample's id (its index in the split)."""
        shard = int(np.searchsorted(self._first_id, sample, side="right")) - 1
        return shard, sample - int(self._first_id[shard])
