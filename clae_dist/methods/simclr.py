"""SimCLR: two views of an image are each other's positives.

Reference: Chen et al. 2020, A Simple Framework for Contrastive Learning of Visual Representations, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from clae_dist.config import Attack, MethodSettings
from clae_dist.config.method import name_of
from clae_dist.contrast.method import Method, Terms
from clae_dist.methods.local_crops import local_terms

if TYPE_CHECKING:
    import torch

    from clae_dist.contrast.interface import Step


@dataclass(frozen=True)
class SimClrSettings(MethodSettings):
    """SimCLR has no settings of its own."""

    title: ClassVar[str] = "SimCLR"
    takes_local_crops: ClassVar[bool] = True
    name: str = name_of("simclr")

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        return 6


class SimClr(Method):
    """L(z(x), z(y)), and a term of small crops, if there are any."""

    Settings = SimClrSettings

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        a, b = s.embed_views(x, y)
        return {"clean": (1.0, s.contrast(a, b)), **local_terms(s, a, b)}
