"""Settings of methods whose every step attacks whole views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from clae_dist.config import Attack, MethodSettings
from clae_dist.config.rules import setting
from clae_dist.errors import ConfigError
from clae_dist.objectives.multi_view import HardNegatives

if TYPE_CHECKING:
    from clae_dist.config import Config


@dataclass(frozen=True)
class ViewsSettings(MethodSettings):
    """The line for the console, for methods that attack all images of a view in every step."""

    uses_attack: ClassVar[bool] = True

    def describe(self, attack: Attack) -> str:
        return f"method: {self.name}{self.describe_attack()}; attack {attack.describe()}, on the global batch's negatives"

    def describe_attack(self) -> str:
        """How the method attacks, for `describe`."""
        return ""


@dataclass(frozen=True)
class HardSettings(ViewsSettings):
    """Methods with a loss of their own on many views, whose negatives may be weighted (A-InfoNCE's hard negatives).

    Reference: Yu et al. 2022, Adversarial contrastive learning via asymmetric InfoNCE.
    """

    tau_plus: float = setting(
        0.0, ge=0, lt=1, zero="all negatives alike", help="Hard negatives: the share of an anchor's class among its negatives."
    )
    beta: float = setting(
        1.0, ge=0, zero="equal weights", used_by="method.tau_plus", help="Hard negatives: concentration on the closest ones."
    )

    @property
    def hard(self) -> HardNegatives | None:
        return HardNegatives(self.beta, self.tau_plus) if self.tau_plus else None

    def check_run(self, config: Config) -> None:
        if config.objective.name != "nt_xent":
            raise ConfigError(
                f"objective.name is {config.objective.name!r}, but method.name={self.name} has a loss of its own; remove it."
            )

    def describe_pairs(self, asymmetry: float) -> str:
        """A-InfoNCE's changes of the loss, for `describe`."""
        share = f", asymmetry {asymmetry:g}" if asymmetry >= 0 else ""
        return share + (f", hard negatives (tau_plus {self.tau_plus:g}, beta {self.beta:g})" if self.tau_plus else "")
