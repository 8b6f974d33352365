"""SupCon: supervised contrastive learning, in which all images of a class are each other's positives.

Reference: Khosla et al. 2020, Supervised contrastive learning, equation 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from clae_dist.config.method import name_of
from clae_dist.contrast.method import Method, Terms
from clae_dist.methods.labelled import LabelledSettings

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Attack
    from clae_dist.contrast.interface import Step


@dataclass(frozen=True)
class SupConSettings(LabelledSettings):
    """SupCon has no settings of its own."""

    title: ClassVar[str] = "SupCon"
    name: str = name_of("supcon")

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        return 6


class SupCon(Method):
    """The mean over anchors of both views of -mean log p over the rows of the anchor's class, p the softmax over all others.

    An image without a label has its other view as its only positive.
    """

    Settings = SupConSettings

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        a, b = s.embed_views(x, y)
        return {"clean": (1.0, s.contrast(a, b) + s.spread_positives(a, b, s.labels))}
