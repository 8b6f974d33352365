"""DynACL: ACL whose augmentation weakens over the run while its loss shifts to the adversarial views.

Reference: Luo et al. 2023, Rethinking the effect of data augmentation in adversarial contrastive learning, and its public code.
The augmentation is the recipe's (augment.anneal_epochs); this file holds the weights of the losses and the momentum encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from clae_dist.config.method import name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, Terms
from clae_dist.errors import ConfigError
from clae_dist.methods.views import ViewsSettings

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Attack, Config
    from clae_dist.contrast.interface import Step


@dataclass(frozen=True)
class DynAclSettings(ViewsSettings):
    """The keys `method.*` of DynACL."""

    title: ClassVar[str] = "DynACL"
    evaluated_route: ClassVar[Literal["clean", "adversarial"]] = "adversarial"
    name: str = name_of("dynacl")
    shift: float = setting(
        2 / 3, ge=0, le=1, zero="equal weights", help="Weight that has gone from the clean to the adversarial loss at the end."
    )
    block_epochs: int = setting(50, ge=1, hint="50 of 1,000 is the paper's", help="Epochs between changes of the weights.")
    momentum: float = setting(
        0.99, ge=0, lt=1, zero="the encoder itself", help="Decay of the average of weights that embeds the second views."
    )

    @property
    def key_decay(self) -> float:
        return self.momentum

    @property
    def key_statistics(self) -> Literal["averaged", "own"]:
        return "own"

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        return 8 + 5 * attack.num_steps if self.momentum else 12 + 4 * attack.num_steps

    def check_run(self, config: Config) -> None:
        if self.momentum and config.model.statistics_differ:
            raise ConfigError(
                f"model.{config.model.statistics_differ}, but the momentum encoder of method.name=dynacl keeps running "
                "statistics, which would differ between ranks; use model.norm=global with model.norm_group=all, or "
                "method.momentum=0."
            )

    def describe_attack(self) -> str:
        return f", shift {self.shift:.3g} in blocks of {self.block_epochs} epochs, momentum {self.momentum:g}"

    def adversarial_weight(self, epoch: int, epochs: float) -> float:
        """Weight of the adversarial loss in epoch `epoch` (from 0) of `epochs`, from 1 to 2; the clean loss has the rest of 2.

        Reference: equation 7 of the paper; in its code a block ends one epoch before that of the augmentation, as here.
        """
        return min(1 + self.shift * ((epoch + 1) // self.block_epochs) * self.block_epochs / epochs, 2.0)


class DynAcl(Method):
    """½ [(2 - w) L(f(x), g(y)) + w L(f(x_adv), g(y_adv))], where w grows over the run and g is the average of the encoder f.

    x_adv and y_adv together raise the second loss within ε of x and y, y_adv through g. Weights have gradient through f alone.
    """

    Settings = DynAclSettings
    settings: DynAclSettings

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        keys = self.settings.momentum > 0
        x_adv, y_adv = s.attack_views([x, y], lambda views: s.contrast(*views), keys=keys)
        if keys:  # before the encoder's own forwards
            b, b_adv = s.embed_constant(y, momentum=True), s.embed_constant(y_adv, "adversarial", momentum=True)
            a, c = s.embed_views(x, adversarial=[x_adv])
        else:
            b, a, b_adv, c = s.embed_views(y, x, adversarial=[y_adv, x_adv])
        clean, adversarial = s.contrast(a, b), s.contrast(c, b_adv)
        weight = self.settings.adversarial_weight(int(s.epoch), s.epochs)
        return {"clean": (1 - weight / 2, clean), "adversarial": (weight / 2, adversarial)}
