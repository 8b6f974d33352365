"""Checkpoints made without training: what the tests of whoever reads or writes them have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from clae_dist.runs.checkpoint import Checkpoint, Piece, Writer
from clae_dist.runs.folder import RunFolder, step_of

CPU = torch.device("cpu")


def pieces_of(name: str, tensor: torch.Tensor, rank: int, size: int, sharded: bool) -> Piece:
    """Rank's piece of a whole tensor: all of it, as every rank has, or the rank's run of elements, which may be empty."""
    if not sharded:
        return Piece(name, tuple(tensor.shape), 0, tensor, tuple(range(size)))
    length = -(-tensor.numel() // size)
    start = min(rank * length, tensor.numel())
    return Piece(name, tuple(tensor.shape), start, tensor.reshape(-1)[start : start + length], (rank,))


def write_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    size: int = 1,
    sharded: bool = False,
    keep: int = 3,
    attempt: str = "attempt0",
    **info: Any,
) -> Path:
    """A whole checkpoint, as `size` ranks would write it."""
    writers = [Writer(run_dir, rank, size, attempt, CPU) for rank in range(size)]
    for rank, writer in enumerate(writers):
        writer.begin(step, [pieces_of(name, tensor, rank, size, sharded) for name, tensor in tensors.items()])
    for writer in writers:
        writer.join()
        assert not writer.problem, writer.problem
    everything = {"images_seen": 32 * step, "train_s": 1.5, "bad_samples": {}, **info}
    writers[0].commit(step, "ddp", everything, keep, 0.0)
    writers[0].join()
    assert not writers[0].problem, writers[0].problem
    return next(path for path in RunFolder(run_dir).find_checkpoints() if step_of(path) == step)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every type and layout that a state has."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "model/conv.weight": draw(5, 3, 3, 3).to(memory_format=torch.channels_last),
        "model/linear.weight": draw(7, 11).double(),
        "model/half": draw(6).bfloat16(),
        "model/steps": torch.tensor(17 + seed),
        "model/mask": draw(9) > 0,
        "model/empty": torch.empty(0, 4),
        "optimizer/linear.weight/exp_avg": draw(7, 11).t().contiguous().t(),
        "optimizer/linear.weight/step": torch.tensor(3.0),
    }


def assert_same(found: Checkpoint, wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def flip(file: str, at: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray((path / file).read_bytes())
        data[at] ^= 1
        (path / file).write_bytes(data)

    return damage


R1, INDEX = "rank-00001.safetensors", "checkpoint.json"
