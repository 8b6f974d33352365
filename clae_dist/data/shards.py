"""Read samples by shard and row, from memory-mapped shards with the offsets of their index."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from clae_dist.data.decode import DecodeError, decode_rgb
from clae_dist.data.manifest import Manifest
from clae_dist.data.tar_index import files_of, stored_name
from clae_dist.errors import DataError

_OPEN_SHARDS = 512


class BadSampleError(DataError):
    """An undecodable sample, with its name and the reason."""

    def __init__(self, sample: str, reason: str, way_out: str) -> None:
        super().__init__(f"{sample} cannot be decoded ({reason}); {way_out}")
        self.sample, self.reason, self._way_out = sample, reason, way_out

    def __reduce__(self) -> tuple[type[BadSampleError], tuple[str, str, str]]:  # it may come from a loader process
        return BadSampleError, (self.sample, self.reason, self._way_out)


@dataclass(frozen=True)
class Sample:
    """The result of reading a sample."""

    image: torch.Tensor  # uint8 (3, H, W)
    label: int  # -1: none
    bad: dict[str, str]  # samples that cannot be decoded, in whose place this one is, with reasons
    metadata: dict[str, bytes]  # the files that were asked for, by kind; those that it has


class ShardReader:
    """The images of one split, by (shard, row). Opens shards when first read; safe to send to loader processes.

    `metadata`: kinds of files (`json`, `txt`) that `read_or_next` returns with an image. `processes`: number of processes of
    this machine that read from the same disk.
    """

    def __init__(self, manifest: Manifest, split: str, metadata: tuple[str, ...] = (), processes: int = 1) -> None:
        self.manifest = manifest
        self.split = split
        self._kinds, self._processes = metadata, processes
        self.reading_s = 0.0  # that `read` has spent on getting bytes, by this process
        shards = manifest.shards(split)
        self.sizes = [shard.samples for shard in shards]
        self._first_id = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        files = manifest.files
        max_open = files.max_open([shard.bytes for shard in shards], processes) if files else _OPEN_SHARDS
        self._open = lru_cache(max_open)(self._map)

    def __getstate__(self) -> tuple[Manifest, str, tuple[str, ...], int]:
        return self.manifest, self.split, self._kinds, self._processes

    def __setstate__(self, state: tuple[Manifest, str, tuple[str, ...], int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def _map(self, shard: int) -> tuple[memoryview, np.ndarray]:
        record = self.manifest.splits[self.split][shard]
        with self.manifest.open(record) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.bytes:  # before mapping, which refuses an empty file with an error of its own
                raise DataError(
                    f"{self.manifest.where}/{record.name} has {size} bytes, the manifest expects {record.bytes}: it was "
                    f"cut short or changed; `python -m data_prep verify {self.manifest.where}` prints the difference."
                )
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(mapped), self.manifest.index(record)

    def encoded(self, shard: int, row: int) -> tuple[memoryview, int]:
        """The encoded image, as a view of the mapped shard, and its label (-1: none).

        The shard stays mapped as long as these bytes are referenced, also after this reader has closed it.
        """
        mapped, index = self._open(shard)
        offset, length, label = index[row].tolist()
        return mapped[offset : offset + length], label

    def read(self, shard: int, row: int) -> tuple[torch.Tensor, int]:
        """The decoded image, uint8 (3, H, W), and its label (-1: none). Raises BadSampleError, naming shard and row."""
        start = time.perf_counter()
        data, label = self.encoded(shard, row)
        bytes(data[:: mmap.PAGESIZE])  # a mapped file is read when it is touched: now, and not by the decoder
        self.reading_s += time.perf_counter() - start
        try:
            return decode_rgb(data), label
        except DecodeError as error:
            name = self.manifest.splits[self.split][shard].name
            raise BadSampleError(
                f"sample {row} of {name}",
                str(error),
                f"`python -m data_prep verify {self.manifest.where}` checks if the shard has changed.",
            ) from None

    def metadata(self, shard: int, row: int) -> dict[str, bytes]:
        """The files of a sample by kind, of the requested kinds."""
        if not self._kinds:
            return {}
        (mapped, index), record = self._open(shard), self.manifest.splits[self.split][shard]
        offset = index[row, 0]
        before = index[index[:, 0] < offset, :2].sum(1).max(initial=0)  # where the image before ends
        files = files_of(mapped.obj, record.name, int(offset), int(before))  # type: ignore[arg-type]
        return {kind: bytes(mapped[f.offset : f.offset + f.size]) for kind, f in files.items() if kind in self._kinds}

    def read_or_next(self, shard: int, row: int) -> Sample:
        """The sample, or the next one in its shard that can be decoded (after the last, the first).

        The replacement depends only on the shard. Raises DataError if no sample of the shard can be decoded.
        """
        bad: dict[str, str] = {}
        for other in (*range(row, self.sizes[shard]), *range(row)):
            try:
                return Sample(*self.read(shard, other), bad, self.metadata(shard, other))
            except BadSampleError as error:
                bad[error.sample] = error.reason
        name = self.manifest.splits[self.split][shard].name
        raise DataError(
            f"none of the {len(bad)} samples of {name} can be decoded ({next(iter(bad.values()))}); prepare the set again."
        )

    def place(self, sample: int) -> tuple[int, int]:
        """Shard and row of a sample's id (its index in the split)."""
        shard = int(np.searchsorted(self._first_id, sample, side="right")) - 1
        return shard, sample - int(self._first_id[shard])

    def name_of(self, sample: int) -> str:
        """Shard and key of a sample's id, such as "train-000001.tar: 000017.jpg"; the key is the name in the archive."""
        shard, row = self.place(sample)
        return f"{self.manifest.splits[self.split][shard].name}: {self.stored_name(shard, row)} (sample {row})"

    def stored_name(self, shard: int, row: int) -> str:
        """The name of the image in the archive."""
        mapped, index = self._open(shard)
        return stored_name(mapped, int(index[row, 0]))
