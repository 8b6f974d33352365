"""ACL-AIR: ACL with two invariant regularisers; with DynACL's schedules, DynACL-AIR.

Reference: Xu et al. 2023, Enhancing adversarial contrastive learning via adversarial invariant regularization, and its code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from clae_dist.config.method import ThirdView, name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, Terms
from clae_dist.methods.views import ViewsSettings

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Attack
    from clae_dist.contrast.interface import Step
    from clae_dist.objectives.form import Rows


@dataclass(frozen=True)
class AirSettings(ViewsSettings):
    """The keys `method.*` of ACL-AIR."""

    title: ClassVar[str] = "ACL-AIR"
    third_view: ClassVar[ThirdView] = "bare"
    evaluated_route: ClassVar[Literal["clean", "adversarial"]] = "adversarial"
    name: str = name_of("air")
    standard: float = setting(0.5, ge=0, zero="none", help="Weight of the standard invariant regulariser (SIR).")
    adversarial: float = setting(0.5, ge=0, zero="none", help="Weight of the adversarial invariant regulariser (AIR).")
    form: Literal["paper", "code"] = setting(
        "paper",
        help="paper: the regularisers are Kullback-Leibler divergences; code: its kl_div takes a probability where a logarithm "
        "belongs, as the published numbers do.",
    )
    shift: float = setting(
        0.0, ge=0, le=1, zero="ACL-AIR", help="Weight that moves to the adversarial loss as the augmentation weakens."
    )

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        return 15 + 4 * attack.num_steps

    def describe_attack(self) -> str:
        weights = f"{self.standard:g} SIR + {self.adversarial:g} AIR"
        return f", {weights} as in the {self.form}, shift {self.shift:.3g}"


class Air(Method):
    """(1 - w) L(z(x), z(y)) + (1 + w) L(z(x_adv), z(y_adv)) + λ1 · SIR + λ2 · AIR, where w = shift · (1 - augmentation).

    x_adv and y_adv are ACL's. o is the bare image. With p(u, v) = softmax over the images i of the global batch of
    u_i · v_i / temperature: SIR = KL(p(y, o) || p(x, o)), AIR = KL(q(y) || q(x)) with q(x) = p(x_adv, x) p(x_adv, o).
    """

    Settings = AirSettings
    settings: AirSettings

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        settings = self.settings
        x_adv, y_adv = s.attack_views([x, y], lambda views: s.contrast(*views))
        a, b, o, c, d = s.embed_views(x, y, s.third, adversarial=[x_adv, y_adv])
        weight = settings.shift * (1 - s.augmentation)
        terms: Terms = {"clean": (1 - weight, s.contrast(a, b)), "adversarial": (1 + weight, s.contrast(c, d))}
        if settings.standard:
            terms["sir"] = (settings.standard, self._divergence(self._log_p(s, b, o), self._log_p(s, a, o)))
        if settings.adversarial:
            x_q, y_q = (self._log_p(s, u, v) + self._log_p(s, u, o) for u, v in ((c, a), (d, b)))
            terms["air"] = (settings.adversarial, self._divergence(y_q, x_q))
        return terms

    @staticmethod
    def _log_p(s: Step, first: Rows, second: Rows) -> torch.Tensor:
        return s.everyones((first.mine * second.mine).sum(1) / s.temperature).log_softmax(0)

    def _divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """Σ p (log p - log q), (): of distributions over the images, or of their products."""
        return (log_p.exp() * (log_p - (log_q.exp() if self.settings.form == "code" else log_q))).sum()
