"""A training step for tests, on a small model and on images that every rank takes its own part of.

# N rows of the global batch, B = N / W a rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from clae_dist.config import Attack, Config
from clae_dist.contrast.step import Pretraining
from clae_dist.parallel import Backend
from clae_dist.training.clock import Clock
from clae_dist.training.pretraining import make_pretraining
from clae_dist.world import World


def images(seed: int, count: int, side: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(count, 3, side, side) in [0.2, 0.8]: every row another one, and no pixel near the bounds."""
    generator = torch.Generator().manual_seed(seed)
    return (0.2 + 0.6 * torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64)).to(dtype)


def share(world: World, rows: torch.Tensor) -> torch.Tensor:
    """This rank's part of the global batch."""
    size = len(rows) // world.size
    return rows[world.rank * size : (world.rank + 1) * size]


def pretraining(config: Config, world: World, backend: Backend, noise: torch.Tensor | None = None) -> Pretraining:
    """What a step works with, as training makes it; a batch is a pair (x, y), `noise` that of the whole global batch."""

    def noise_of(batch: Any) -> torch.Tensor:
        assert noise is not None
        return share(world, noise)

    run = make_pretraining(config, world, backend, Clock(world.device))
    return replace(run, augment=lambda batch: batch, noise=noise_of)


def attacked(attack: Attack, rows: int) -> list[int]:
    """Rows of the global batch that have an adversarial view: those where ⌊(i+1)·fraction⌋ steps up."""
    return [i for i in range(rows) if int((i + 1) * attack.fraction + 1e-9) > int(i * attack.fraction + 1e-9)]
