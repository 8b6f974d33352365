"""The length of a cell: as many steps as its budget allows.

An encoder pass is the forward of one view of one image; a backward counts two, the backward to the image alone one
(MethodSettings.units, which `clae bench step` compares with the operations of a step). Attacks, adversarial views and forwards
of a momentum encoder count; the projector, the loss, the augmentations and the data loader do not, and neither do the repeated
forwards of batch.micro_size.
"""

from __future__ import annotations

from dataclasses import dataclass

from clae_dist.config import Config
from clae_dist.errors import ConfigError
from clae_dist.models import build_model
from clae_dist.models.norms import routes_are_one_function


@dataclass(frozen=True)
class Cost:
    """Encoder passes of a configuration's steps, over all images of the global batches."""

    config: Config
    shared_norms: bool

    @staticmethod
    def of(config: Config) -> Cost:
        """Raises ConfigError for a method or a setting whose cost is not counted."""
        method, attack = config.method, config.attack
        if config.views.local_crops:
            raise ConfigError("views.local_crops are not counted in encoder passes; use budget.seconds or budget.images.")
        if method.units(attack) is None:
            raise ConfigError(
                f"method.name={method.name} does not count its encoder passes (MethodSettings.units); use budget.seconds or "
                "budget.images."
            )
        matters = method.units(attack, shared_norms=True) != method.units(attack)
        return Cost(config, matters and routes_are_one_function(build_model(config)))

    def passes(self, steps: int, steps_per_epoch: int) -> float:
        """Encoder passes of the first `steps` steps."""
        config = self.config
        units = config.method.total_units(config.attack, steps, steps_per_epoch, shared_norms=self.shared_norms)
        assert units is not None, "checked by Cost.of"
        return units * config.batch.global_size

    def steps_for(self, passes: float, steps_per_epoch: int) -> int:
        """The most steps whose encoder passes are at most `passes`. Raises ConfigError for less than one step."""
        low, high = 0, 1
        while self.passes(high, steps_per_epoch) <= passes:
            low, high = high, 2 * high
        while high - low > 1:  # passes grow with every step
            middle = (low + high) // 2
            low, high = (middle, high) if self.passes(middle, steps_per_epoch) <= passes else (low, middle)
        return _at_least_one(low, f"{passes:g} encoder passes", f"{self.passes(1, steps_per_epoch):,.0f}", self.config)


def steps_for_images(config: Config, images: float) -> int:
    """The most steps that see at most `images` images. Raises ConfigError for less than one step."""
    size = config.batch.global_size
    return _at_least_one(int(images // size), f"{images:g} images", f"{size}", config)


def steps_for_seconds(config: Config, seconds: float, images_per_s: float) -> int:
    """The most steps that take at most `seconds` at a measured speed. Raises ConfigError for less than one step."""
    step_s = config.batch.global_size / images_per_s
    return _at_least_one(int(seconds // step_s), f"{seconds:g} s", f"{step_s:.3g} s", config)


def _at_least_one(steps: int, budget: str, needed: str, config: Config) -> int:
    if steps < 1:
        raise ConfigError(
            f"the budget of {budget} is too small for one step of method.name={config.method.name}, which needs {needed}; use "
            "a larger budget or a smaller batch.global_size."
        )
    return steps
