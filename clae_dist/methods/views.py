"""Settings of methods whose every step attacks whole views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clae_dist.config import Attack, MethodSettings


@dataclass(frozen=True)
class ViewsSettings(MethodSettings):
    """The line for the console, for methods that attack all images of a view in every step."""

    uses_attack: ClassVar[bool] = True

    def describe(self, attack: Attack) -> str:
        return f"method: {self.name}{self.describe_attack()}; attack {attack.describe()}, on the global batch's negatives"

    def describe_attack(self) -> str:
        """How the method attacks, for `describe`."""
        return ""
