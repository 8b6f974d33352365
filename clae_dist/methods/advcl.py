"""AdvCL: two views, a high-pass view and an adversarial view of the image, each contrasted with all others.

Reference: Fan et al. 2021, When does contrastive learning preserve adversarial robustness from pretraining to finetuning?, and
its code. Its cross-entropy with pseudo-labels of an ImageNet encoder is not here. With `asymmetry` and `tau_plus`: A-InfoNCE
(Yu et al. 2022, Adversarial contrastive learning via asymmetric InfoNCE).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from clae_dist.config.method import ThirdView, name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, Terms
from clae_dist.methods.views import HardSettings
from clae_dist.objectives.multi_view import ViewPairs, every_pair

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Attack
    from clae_dist.contrast.interface import Step
    from clae_dist.objectives.form import Rows

_BASE_TEMPERATURE = 0.07  # SupCon's, which its code divides by: part of the published learning rate


@dataclass(frozen=True)
class AdvClSettings(HardSettings):
    """The keys `method.*` of AdvCL."""

    title: ClassVar[str] = "AdvCL"
    third_view: ClassVar[ThirdView] = "weak"
    evaluated_route: ClassVar[Literal["clean", "adversarial"]] = "adversarial"
    name: str = name_of("advcl")
    radius: float = setting(8.0, ge=0, zero="the whole image", help="Frequencies below it are not in the high-pass view.")
    asymmetry: float = setting(
        -1.0,
        ge=-1,
        le=1,
        hint="-1 is AdvCL itself; A-InfoNCE has 0.2",
        help="Share of the pairs with the adversarial view that move the clean one; columns are then constants. -1: AdvCL.",
    )
    adversarial_weight: float = setting(
        1.0, ge=0, used_by="method.asymmetry", help="Weight of the pairs with the adversarial view (A-InfoNCE)."
    )

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        return 15 + 2 * attack.num_steps

    def describe_attack(self) -> str:
        return f", high-pass radius {self.radius:g}" + self.describe_pairs(self.asymmetry)

    @property
    def pairs(self) -> ViewPairs:
        """The pairs of views (adversarial, x, y, high-pass)."""
        pairs = dict(every_pair(4, 1 / 12))
        if self.asymmetry < 0:
            return ViewPairs(live=pairs, hard=self.hard)
        live = {pair: weight for pair, weight in pairs.items() if 0 not in pair}
        towards, away = (2 * self.adversarial_weight / 12 * share for share in (self.asymmetry, 1 - self.asymmetry))
        constant = {(view, 0): towards for view in (1, 2, 3)} | {(0, view): away for view in (1, 2, 3)}
        return ViewPairs(live, constant, self.hard)


class AdvCl(Method):
    """The mean over the ordered pairs of (x_adv, x, y, high-pass of o) of each view's loss, all views in the denominators.

    o is the weakly augmented image, and x_adv raises the same loss (without A-InfoNCE's changes) within ε of o.
    """

    Settings = AdvClSettings
    settings: AdvClSettings

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        sharp = high_pass(s.third, self.settings.radius)
        plain = ViewPairs(live=every_pair(4, 1 / 12))
        with s.attack_forwards():
            others = [s.embed_constant(view) for view in (x, y, sharp)]

        def loss(views: Sequence[Rows]) -> torch.Tensor:
            return s.contrast_views([*views, *others], plain)

        (x_adv,) = s.attack_views([s.third], loss, noise_of=2)
        views = [s.embed(x_adv, "adversarial"), *(s.embed(view) for view in (x, y, sharp))]
        return {"four_views": (s.temperature / _BASE_TEMPERATURE, s.contrast_views(views, self.settings.pairs))}


def high_pass(images: torch.Tensor, radius: float) -> torch.Tensor:
    """The images without the frequencies closer than `radius` to 0, in cycles per image side. Not clipped. (B, 3, S, S)"""
    import torch

    side = images.shape[-1]
    cycles = torch.fft.fftfreq(side, d=1 / side, device=images.device, dtype=images.dtype)
    low = cycles[:, None].square() + cycles[None, :].square() < radius**2
    return torch.fft.ifft2(torch.fft.fft2(images).masked_fill(low, 0)).real
