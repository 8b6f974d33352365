"""Settings of the attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clae_dist.config.rules import no_effect, require
from clae_dist.errors import ConfigError


@dataclass(frozen=True)
class Attack:
    """The adversarial view (Ho & Vasconcelos 2020, section 3)."""

    name: Literal["fgsm", "pgd", "none"] = "fgsm"  # none: plain SimCLR
    norm: Literal["linf", "l2"] = "linf"  # of the perturbation
    epsilon: float = 4 / 255  # largest change of a pixel value (linf) or length of an image's change (l2), in the unit below
    unit: Literal["pixel", "normalised"] = "pixel"  # pixel: of [0, 1]; normalised: after subtracting mean, dividing by std
    clip: bool = True  # keep the adversarial image a valid image
    anchor: Literal["same", "other"] = "same"  # the view the attack moves away from: its own image's same view, or the other
    # exact: the paper's gradient at the least cost. original: the same with the forward and the weight gradients that the
    # paper's code computes and throws away. fused: another algorithm, the gradient that the clean loss has anyway in view y.
    cost: Literal["exact", "original", "fused"] = "exact"
    steps: int = 5  # of pgd; fgsm takes one
    step_size: float = 0.0  # in the unit of epsilon; 0: epsilon for fgsm, 2.5 epsilon / steps for pgd (Madry et al. 2018)
    random_start: bool = False  # from a random place in the ball rather than from its middle
    fraction: float = 1.0  # share of the batch that has an adversarial view; these are contrasted among themselves
    every: int = 1  # only every so many steps have an adversarial term
    # Parameters ask for no gradient while the attack runs. auto: where train.compile would compute them otherwise.
    freeze: Literal["auto", "always", "never"] = no_effect("auto")
    statistics: Literal["untouched", "updated"] = "untouched"  # what the attack's forwards do to running statistics
    alpha: float = 1.0  # weight of the adversarial term
    start_epoch: float = 0.0  # alpha is 0 and nothing is attacked before

    def __post_init__(self) -> None:
        require(self.epsilon >= 0, "attack.epsilon", self.epsilon, "use 0 or more; 4/255 = 0.0157 is usual in pixels.")
        require(self.alpha >= 0, "attack.alpha", self.alpha, "use 0 or more.")
        require(self.start_epoch >= 0, "attack.start_epoch", self.start_epoch, "use 0 or more.")
        require(self.steps >= 1, "attack.steps", self.steps, "use at least 1.")
        require(self.step_size >= 0, "attack.step_size", self.step_size, "use 0 (automatic) or more.")
        require(0 < self.fraction <= 1, "attack.fraction", self.fraction, "use a share above 0 and at most 1.")
        require(self.every >= 1, "attack.every", self.every, "use at least 1 (every step).")
        if self.norm == "l2":
            require(
                self.unit == "pixel", "attack.unit", self.unit, "attack.norm=l2 is a length in pixels: use attack.unit=pixel."
            )
        if self.cost == "fused" and self.name != "none":
            fused = "attack.cost=fused takes the gradient that the clean loss has in the other view, once"
            require(self.anchor == "other", "attack.anchor", self.anchor, f"{fused}: use attack.anchor=other.")
            require(self.name != "pgd", "attack.name", self.name, f"{fused}: use attack.name=fgsm, or attack.cost=exact.")
            require(not self.random_start, "attack.random_start", True, f"{fused}: use false, or attack.cost=exact.")
            require(
                self.statistics == "untouched",
                "attack.statistics",
                self.statistics,
                "attack.cost=fused has no forward of its own: use untouched.",
            )

    @property
    def num_steps(self) -> int:
        """Gradients that an attack takes."""
        return self.steps if self.name == "pgd" else 1

    @property
    def length_of_step(self) -> float:
        """How far one step goes, in the unit of epsilon."""
        return self.step_size or (2.5 * self.epsilon / self.steps if self.name == "pgd" else self.epsilon)

    def rows(self, num_rows: int) -> int:
        """How many of a rank's rows have an adversarial view. Raises ConfigError when it is no whole number."""
        chosen = self.fraction * num_rows
        if abs(chosen - round(chosen)) > 1e-6 or round(chosen) < 1:
            raise ConfigError(
                f"attack.fraction is {self.fraction:g}, which makes {chosen:g} of a rank's {num_rows} rows; every "
                f"rank needs the same whole number: {max(1, round(chosen)) / num_rows:g} would do."
            )
        return round(chosen)
