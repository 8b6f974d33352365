"""CLAE with an attack that costs no forward and no backward of its own. Another algorithm than the paper's.

The clean loss has a gradient in view y already: the perturbation is a step along it. The attack thus moves away from the
other view (y instead of x) and takes the clean route of norm layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from clae_dist.config import Attack
from clae_dist.config.method import name_of
from clae_dist.config.rules import require
from clae_dist.contrast.method import Method, Terms
from clae_dist.methods.adversarial_term import AdversarialTerm

if TYPE_CHECKING:
    import torch

    from clae_dist.contrast.interface import Step


@dataclass(frozen=True)
class ClaeFusedSettings(AdversarialTerm):
    """The keys `method.*` of fused CLAE."""

    title: ClassVar[str] = "CLAE (fused attack)"
    name: str = name_of("clae_fused")

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        return 6 + 3 * self.fraction

    def check(self, attack: Attack) -> None:
        one = "method.name=clae_fused takes one gradient, that of the clean loss in view y"
        require(attack.name != "pgd", "attack.name", attack.name, f"{one}: use attack.name=fgsm, or method.name=clae.")
        require(not attack.random_start, "attack.random_start", True, f"{one}: use false, or method.name=clae.")
        require(
            attack.statistics == "untouched",
            "attack.statistics",
            attack.statistics,
            "method.name=clae_fused has no forward for the attack alone: use untouched.",
        )


class ClaeFused(Method):
    """L(z(x), z(y)) + α · L(z(x), z(y_adv)), where y_adv is one step from y along ∂L(z(x), z(y)) / ∂y."""

    Settings = ClaeFusedSettings
    settings: ClaeFusedSettings

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        settings = self.settings
        if not settings.present(s):
            return {"clean": (1.0, s.contrast(*s.embed_views(x, y)))}
        rows = s.choose(settings.num_attacked(len(x)), len(x))
        with s.reduction_held():  # gradients are reduced once, in the last backward of the step
            a, b = s.embed(x), s.embed(y, image_gradient=True)
            clean = s.contrast(a, b)
            gradient = s.image_gradient(clean, b)
        y_adv = s.move(y[rows], gradient[rows], clean)
        c = s.embed(y_adv, "adversarial")
        return {"clean": (1.0, clean), "adversarial": (settings.alpha, s.contrast(s.select(a, rows), c))}
