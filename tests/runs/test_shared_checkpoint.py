"""A start reads each tensor of a checkpoint on one rank; the others are sent the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clae_dist.bench.measure import replaced
from clae_dist.errors import CheckpointError, DamagedError
from clae_dist.runs.checkpoint import Checkpoint, SharedCheckpoint
from clae_dist.runs.checkpoint import shared as shared_checkpoint
from clae_dist.world import World
from tests.checkpoints import tensors, write_checkpoint
from tests.ranks import RankPool


class _Counting(Checkpoint):
    """Counts the bytes that this rank reads; a rank with `broken` cannot read a tensor."""

    num_bytes = 0
    broken = False

    def __getitem__(self, name: str) -> torch.Tensor:
        if self.broken:
            raise DamagedError(f"{name} cannot be read (a disk)")
        tensor = super().__getitem__(name)
        self.num_bytes += tensor.nbytes
        return tensor


def load(world: World, path: Path, chunk: int) -> tuple[dict[str, torch.Tensor], int]:
    checkpoint = _Counting(path)
    with replaced(shared_checkpoint, _CHUNK=chunk):
        loaded = SharedCheckpoint(checkpoint, world)
        state = dict(loaded)
        loaded.agree()
    return state, checkpoint.num_bytes


@pytest.mark.parametrize(("world_size", "chunk"), [(1, 64 << 20), (3, 64 << 20), (3, 100)])
def test_every_byte_is_read_once(ranks: RankPool, tmp_path: Path, world_size: int, chunk: int) -> None:
    saved = {f"{name}/{i}": value for i in range(6) for name, value in tensors(i).items()}
    path = write_checkpoint(tmp_path, 1, saved, 2)
    results = ranks.run(world_size, load, path, chunk)
    for state, _ in results:
        assert state.keys() == saved.keys()
        for name, value in saved.items():
            assert state[name].dtype == value.dtype
            assert torch.equal(state[name], value), name
    read = [num_bytes for _, num_bytes in results]
    assert sum(read) == sum(value.nbytes for value in saved.values())
    assert max(read) < 1.2 * sum(read) / world_size


def fail_on_one(world: World, path: Path) -> str:
    checkpoint = _Counting(path)
    checkpoint.broken = world.rank == 1
    loaded = SharedCheckpoint(checkpoint, world)
    dict(loaded)
    try:
        loaded.agree()
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_rank_that_cannot_read_ends_all(ranks: RankPool, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, tensors(), 2)
    told = set(ranks.run(2, fail_on_one, path))
    assert len(told) == 1
    assert "cannot be read (rank 1: " in told.pop()
