"""What every setting's class uses: how a mistake is said, and what may change between two starts of a run."""

from __future__ import annotations

from dataclasses import field
from typing import Any


class ConfigError(ValueError):
    """What a user wrote cannot be used. The message holds the key, the value and the way out."""


def require(condition: bool, key: str, value: object, way_out: str) -> None:
    """Raises ConfigError unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} is {value!r}; {way_out}")


NO_EFFECT = {"no_effect_on_result": True}


def no_effect(default: Any) -> Any:
    """A field that changes how a run is executed or watched, never its result: a resumed run may change it."""
    return field(default=default, metadata=NO_EFFECT)
