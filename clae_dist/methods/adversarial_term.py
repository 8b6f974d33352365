"""Settings of methods that add an adversarial term to the clean loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, ClassVar, Self

from clae_dist.config import Attack, MethodSettings
from clae_dist.config.rules import setting
from clae_dist.errors import ConfigError

if TYPE_CHECKING:
    from clae_dist.contrast.interface import Step


@dataclass(frozen=True)
class AdversarialTerm(MethodSettings):
    """Weight of the adversarial term, and when and on which part of the batch it is computed."""

    uses_attack: ClassVar[bool] = True
    units_without_term: ClassVar[float] = 6  # of a step whose loss is the clean one alone

    alpha: float = setting(1.0, ge=0, help="Weight of the adversarial term. moco and ascl have 0 unless it is set.")
    start_epoch: float = setting(0.0, ge=0, help="Epochs before the first adversarial term.")
    every: int = setting(1, ge=1, hint="1 is every step", help="Only every so many steps have an adversarial term.")
    fraction: float = setting(
        1.0, gt=0, le=1, help="Share of the batch with an adversarial view; these images are contrasted among themselves."
    )

    def present(self, s: Step) -> bool:
        """True if this step has an adversarial term."""
        since = s.step - s.steps(self.start_epoch)
        return self.alpha > 0 and since >= 0 and since % self.every == 0

    def total_units(self, attack: Attack, steps: int, steps_per_epoch: int, *, shared_norms: bool = False) -> float | None:
        units = self.units(attack, shared_norms=shared_norms)
        since = steps - round(self.start_epoch * steps_per_epoch)
        with_term = 0 if self.alpha == 0 or since <= 0 else -(-since // self.every)
        return None if units is None else units * with_term + self.units_without_term * (steps - with_term)

    def describe(self, attack: Attack) -> str:
        share = f"; on {self.fraction:.0%} of the batch" if self.fraction < 1 else ""
        every = f"; every {self.every} steps" if self.every > 1 else ""
        return (
            f"method: {self.name}, alpha {self.alpha:g}{self.describe_attack()}; attack {attack.describe()}, on the global "
            f"batch's negatives{share}{every}"
        )

    def describe_attack(self) -> str:
        """How the method attacks, for `describe`."""
        return ""

    def check_rows(self, rows: int, micro_size: int) -> None:
        attacked = self.num_attacked(rows)
        if micro_size and attacked % micro_size:
            raise ConfigError(
                f"batch.micro_size is {micro_size}, which does not divide the {attacked} attacked rows of a rank "
                f"(method.fraction {self.fraction:g}); try {gcd(rows, attacked)}."
            )

    def num_attacked(self, rows: int) -> int:
        """Number of a rank's rows that have an adversarial view. Raises ConfigError if it is not an integer."""
        attacked = self.fraction * rows
        if abs(attacked - round(attacked)) > 1e-6 or round(attacked) < 1:
            raise ConfigError(
                f"method.fraction is {self.fraction:g}, which makes {attacked:g} of a rank's {rows} rows; expected the same "
                f"integer on every rank, try {max(1, round(attacked)) / rows:g}."
            )
        return round(attacked)

    def from_the_start(self) -> Self:
        return replace(self, start_epoch=0.0, every=1)

    def for_few_rows(self, global_size: int) -> Self:
        return replace(self.from_the_start(), fraction=0.5 if self.fraction < 1 else 1.0)
