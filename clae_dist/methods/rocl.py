"""RoCL: robust contrastive learning with an adversarial image as a third view.

Reference: Kim et al. 2020, Adversarial self-supervised contrastive learning, and its public code. With `asymmetry` and
`tau_plus`: A-InfoNCE (Yu et al. 2022, Adversarial contrastive learning via asymmetric InfoNCE).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from clae_dist.config.method import name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, Terms
from clae_dist.methods.views import HardSettings
from clae_dist.objectives.multi_view import ViewPairs, every_pair

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Attack
    from clae_dist.contrast.interface import Step
    from clae_dist.objectives.form import Rows


@dataclass(frozen=True)
class RoclSettings(HardSettings):
    """The keys `method.*` of RoCL."""

    title: ClassVar[str] = "RoCL"
    name: str = name_of("rocl")
    regulariser: float = setting(
        1 / 256, ge=0, zero="none", help="Weight of NT-Xent between the adversarial images and the other view."
    )

    asymmetry: float = setting(
        0.5, ge=0, le=1, help="Share of the pairs with the adversarial view that move the clean one (A-InfoNCE: 0.2)."
    )
    adversarial_weight: float = setting(
        2.0, ge=0, help="Weight of the pairs with the adversarial view, of which RoCL has twice as many (A-InfoNCE: 1)."
    )

    @property
    def two_routes(self) -> bool:
        return False

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        return 10 + 2 * attack.num_steps

    def describe_attack(self) -> str:
        changed = (self.asymmetry, self.adversarial_weight) != (0.5, 2.0)
        weight = f", weight {self.adversarial_weight:g}" if changed else ""
        return f", regulariser {self.regulariser:g}{weight}" + self.describe_pairs(self.asymmetry if changed else -1)

    @property
    def pairs(self) -> ViewPairs:
        """The pairs of views (x, y, adversarial)."""
        towards, away = (self.adversarial_weight / 3 * share for share in (self.asymmetry, 1 - self.asymmetry))
        clean = {(0, 1): 1 / 3, (1, 0): 1 / 3}
        adversarial = {(view, 2): towards for view in (0, 1)} | {(2, view): away for view in (0, 1)}
        return ViewPairs(constant=clean | adversarial, hard=self.hard)


class Rocl(Method):
    """NT3(z(x), z(y), z(x_adv)) + w · NT2(z(x_adv), z(y)), where x_adv raises NT2(z(x'), z(y)) within ε of x.

    NTv is the sum over ordered pairs of the v views, divided by v, each anchor against all rows of these views. The rows that
    an anchor is compared with are constants, in the attack as well. A-InfoNCE weights the pairs with x_adv by who moves.
    """

    Settings = RoclSettings
    settings: RoclSettings

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        pair = ViewPairs(constant=every_pair(2, 1 / 2))
        with s.attack_forwards():
            other = s.embed_constant(y)

        def loss(views: Sequence[Rows]) -> torch.Tensor:
            return s.contrast_views([*views, other], pair)

        (x_adv,) = s.attack_views([x], loss, route="clean")
        a, b, c = s.embed_views(x, y, x_adv)
        terms: Terms = {"three_views": (1.0, s.contrast_views([a, b, c], self.settings.pairs))}
        if self.settings.regulariser:
            terms["regulariser"] = (self.settings.regulariser, s.contrast_views([c, b], pair))
        return terms
