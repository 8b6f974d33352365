"""A training step for tests, on a small model and on images that every rank takes its own part of.

# N rows of the global batch, B = N / W a rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from clae_dist.config import Attack, Config, MethodSettings
from clae_dist.contrast.step import Pretraining
from clae_dist.methods.clae import Clae
from clae_dist.methods.clae_fused import ClaeFused
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

    def noise_of(batch: Any, view: int) -> torch.Tensor:
        assert noise is not None
        return share(world, noise)

    run = make_pretraining(config, world, backend, Clock(world.device))
    return replace(run, augment=lambda batch: batch, noise=noise_of)


@dataclass(frozen=True)
class Variant:
    """A method and its attack."""

    method: MethodSettings
    attack: Attack

    @property
    def fused(self) -> bool:
        return isinstance(self.method, ClaeFused.Settings)

    @property
    def other_anchor(self) -> bool:
        return self.fused or getattr(self.method, "anchor", "same") == "other"

    @property
    def fraction(self) -> float:
        return getattr(self.method, "fraction", 1.0)


def variant(
    settings: type[MethodSettings] = Clae.Settings,
    alpha: float = 0.7,
    epsilon: float = 0.03,
    attack_name: str = "fgsm",
    **more: Any,
) -> Variant:
    """`more`: keys of the attack and of the method."""
    of_method = {f.name for f in fields(settings)}
    attack = Attack(attack_name, epsilon=epsilon, **{name: value for name, value in more.items() if name not in of_method})
    own = {"alpha": alpha} if "alpha" in of_method else {}
    return Variant(settings(**own, **{name: value for name, value in more.items() if name in of_method}), attack)


def attacked(attack: Variant, rows: int) -> list[int]:
    """Rows of the global batch that have an adversarial view: those where ⌊(i+1)·fraction⌋ steps up."""
    return [i for i in range(rows) if int((i + 1) * attack.fraction + 1e-9) > int(i * attack.fraction + 1e-9)]
