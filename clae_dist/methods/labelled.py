"""Settings of methods that train with labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from clae_dist.config import MethodSettings
from clae_dist.errors import ConfigError

if TYPE_CHECKING:
    from clae_dist.config import Config


def check_no_objective(config: Config) -> None:
    """Raise ConfigError for `objective.name` beside a method that has a loss of its own."""
    if config.objective.name != "nt_xent":
        raise ConfigError(
            f"objective.name is {config.objective.name!r}, but method.name={config.method.name} has a loss of its own; "
            "remove it."
        )


@dataclass(frozen=True)
class LabelledSettings(MethodSettings):
    """Methods with a loss of their own, whose positives are the images of a class."""

    needs_labels: ClassVar[bool] = True

    def check_run(self, config: Config) -> None:
        check_no_objective(config)
