"""Adversarial fine-tuning: adversarial training (AT) and TRADES, in the manner of AFF.

References: Madry et al. 2018, Towards deep learning models resistant to adversarial attacks; Zhang et al. 2019,
Theoretically principled trade-off between robustness and accuracy; Luo et al. 2023 (DynACL) and its public code for two routes
of norm layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from clae_dist.config.method import Route, name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, Terms
from clae_dist.downstream.task import TaskSettings, cross_entropy_each
from clae_dist.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Attack
    from clae_dist.contrast.interface import Step


@dataclass(frozen=True)
class AdversarialSettings(TaskSettings):
    """The keys `method.*` of the task `adversarial`."""

    title: ClassVar[str] = "adversarially fine-tuned classifier"
    uses_attack: ClassVar[bool] = True
    name: str = name_of("adversarial")
    form: Literal["at", "trades"] = setting(
        "trades", help="at: the cross-entropy of attacked images; trades: that of clean ones, and beta times a divergence."
    )
    beta: float = setting(6.0, ge=0, used_by="method.form=trades", help="Weight of TRADES' divergence.")
    norms: Literal["one", "two"] = setting(
        "one",
        help="Norm layers of attacked images: those of clean ones (one), or their own (two, DynACL), which are then evaluated.",
    )

    @property
    def two_routes(self) -> bool:
        return self.norms == "two"

    @property
    def attacked_route(self) -> Route:
        return "adversarial" if self.two_routes else "clean"

    @property
    def evaluated_route(self) -> Literal["clean", "adversarial"]:  # type: ignore[override]
        return "adversarial" if self.two_routes else "clean"

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float | None:
        if self.blocks >= 0:
            return None
        return (7 if self.form == "trades" else 3) + 2 * attack.num_steps

    def check(self, attack: Attack) -> None:
        super().check(attack)
        if self.form == "trades" and not attack.random_start:
            raise ConfigError(
                "attack.random_start is false, but at the clean image the divergence of TRADES has no gradient; use "
                "attack.random_start=true, or method.form=at."
            )

    def describe(self, attack: Attack) -> str:
        weight = f", beta {self.beta:g}" if self.form == "trades" else ""
        return f"{super().describe(attack)}; {self.form}{weight}, {attack.describe()}, {attack.num_steps} steps"


class Adversarial(Method):
    """at: CE(x_adv), where x_adv raises it within ε of x. trades: CE(x) + β · KL(p(x) ‖ p(x_adv)), where x_adv raises the
    second term; p(x) is a constant in the attack, and not in the loss."""

    Settings = AdversarialSettings
    settings: AdversarialSettings

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        settings, labels_B = self.settings, s.labels
        route = settings.attacked_route
        if settings.form == "at":
            moved = s.attack_logits(x, lambda logits: cross_entropy_each(logits, labels_B).mean(), route=route)
            return {"adversarial": (1.0, cross_entropy_each(s.classify(moved, route), labels_B).mean())}
        with s.attack_forwards():
            target = s.classify_constant(x)
        moved = s.attack_logits(x, lambda logits: divergence(target, logits), route=route)
        clean = s.classify(x)
        robust = divergence(clean, s.classify(moved, route))
        return {"clean": (1.0, cross_entropy_each(clean, labels_B).mean()), "divergence": (settings.beta, robust)}


def divergence(logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
    """KL(p_a ‖ p_b), the mean over rows of logits (B, C)."""
    import torch.nn.functional as F

    log_a, log_b = F.log_softmax(logits_a, 1), F.log_softmax(logits_b, 1)
    return (log_a.exp() * (log_a - log_b)).sum(1).mean()
