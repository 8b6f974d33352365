"""A checkpoint that all ranks load together: each tensor is read from storage by one rank, which sends it to the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from clae_dist.errors import CheckpointError, DamagedError
from clae_dist.object_store import StoreError
from clae_dist.runs.checkpoint.index import DTYPES
from clae_dist.runs.checkpoint.pieces import sections
from clae_dist.runs.checkpoint.read import Checkpoint
from clae_dist.world import World

_CHUNK = 64 << 20  # bytes that are sent at a time


class SharedCheckpoint(Mapping[str, torch.Tensor]):
    """The full tensors of `checkpoint` by name. Reading one is collective: all ranks read the same names in the same order.

    Tensors are on the ranks' device, those of a single element on the CPU. If a rank cannot read one, the others get zeros, and
    `agree` raises afterwards: nobody waits for a rank that has failed.
    """

    def __init__(self, checkpoint: Checkpoint, world: World) -> None:
        self._checkpoint, self._world = checkpoint, world
        self._readers = _readers(checkpoint, world.size)
        self._problem = ""

    def state(self) -> dict[str, Any]:
        """The state for Backend.load_state."""
        return sections(self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint)

    def __len__(self) -> int:
        return len(self._checkpoint)

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._world.group is None:
            return self._checkpoint[name]
        entry = self._checkpoint.index.tensors[name]
        size = torch.Size(entry.shape)
        device = torch.device("cpu") if size.numel() <= 1 else self._world.device
        whole = torch.zeros(size, dtype=DTYPES[entry.dtype], device=device)
        reader = self._readers[name]
        if reader == self._world.rank:
            try:
                whole.copy_(self._checkpoint[name])
            except (DamagedError, StoreError) as error:
                self._problem = self._problem or f"rank {reader}: {error}"
        for part in whole.view(-1).view(torch.uint8).split(_CHUNK):
            self._world.send_from(reader, part)
        return whole

    def agree(self) -> None:
        """Raise CheckpointError on every rank if one could not read a tensor. Collective."""
        text = (
            f"{self._checkpoint.path} cannot be read ({self._problem}); start the same command again." if self._problem else ""
        )
        self._world.raise_together(CheckpointError, text)


def _readers(checkpoint: Checkpoint, num_ranks: int) -> dict[str, int]:
    """The rank that reads each tensor, so that all read about as many bytes."""
    loads, readers = [0] * num_ranks, {}
    tensors = checkpoint.index.tensors
    for name in sorted(tensors, key=lambda name: (-tensors[name].num_bytes, name)):
        readers[name] = loads.index(min(loads))
        loads[readers[name]] += tensors[name].num_bytes
    return readers
