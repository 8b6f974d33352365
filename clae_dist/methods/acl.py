"""ACL: adversarial contrastive learning, in which both views are attacked together.

Reference: Jiang et al. 2020, Robust pre-training by adversarial contrastive learning, and its public code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from clae_dist.config.method import name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, Terms
from clae_dist.methods.views import ViewsSettings

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Attack
    from clae_dist.contrast.interface import Step


@dataclass(frozen=True)
class AclSettings(ViewsSettings):
    """The keys `method.*` of ACL."""

    title: ClassVar[str] = "ACL"
    evaluated_route: ClassVar[Literal["clean", "adversarial"]] = "adversarial"
    name: str = name_of("acl")
    form: Literal["dual", "adversarial", "mixed"] = setting(
        "dual",
        help="dual (DS): the mean of the losses of the clean and of the adversarial views; adversarial (A2A): the latter; "
        "mixed (A2S): the clean first view and the adversarial second one.",
    )

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        if self.form == "mixed":
            return 7 + 2 * attack.num_steps
        return (6 if self.form == "adversarial" else 12) + 4 * attack.num_steps

    def describe_attack(self) -> str:
        return f", form {self.form}"


class Acl(Method):
    """½ [L(z(x), z(y)) + L(z(x_adv), z(y_adv))], where x_adv and y_adv together raise the second term within ε of x and y.

    Adversarial views take the adversarial route of norm layers.
    """

    Settings = AclSettings
    settings: AclSettings

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        if self.settings.form == "mixed":
            with s.attack_forwards():
                first = s.embed_constant(x)
            (y_adv,) = s.attack_views([y], lambda views: s.contrast(first, *views), noise_of=1)
            return {"mixed": (1.0, s.contrast(*s.embed_views(x, adversarial=[y_adv])))}
        x_adv, y_adv = s.attack_views([x, y], lambda views: s.contrast(*views))
        if self.settings.form == "adversarial":
            return {"adversarial": (1.0, s.contrast(*s.embed_views(adversarial=[x_adv, y_adv])))}
        a, b, c, d = s.embed_views(x, y, adversarial=[x_adv, y_adv])
        return {"clean": (0.5, s.contrast(a, b)), "adversarial": (0.5, s.contrast(c, d))}
