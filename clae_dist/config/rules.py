"""Settings with help and bounds, and the error for a value that cannot be used.

A section of the configuration is a frozen dataclass whose fields are made by `setting`:

    @dataclass(frozen=True)
    class Batch(Section, prefix="batch"):
        global_size: int = setting(256, ge=2, help="Images of one step over all ranks.")

Bounds are checked when the dataclass is made. Rules that concern several settings belong in the section's `__post_init__`,
which calls `super().__post_init__()` first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from clae_dist.errors import ConfigError


def require(condition: bool, key: str, value: object, way_out: str) -> None:
    """Raise ConfigError unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} is {value!r}; {way_out}")


def _shown(bound: float) -> str:
    return f"{bound:.6g}" if isinstance(bound, float) else str(bound)


@dataclass(frozen=True)
class Rule:
    """Help, bounds and use of one setting.

    Args:
        help: one or two sentences: meaning, unit, meaning of special values.
        ge, gt, le, lt: bounds of the value, or of every element of a list and every value of a mapping.
        zero: meaning of 0, such as "automatic", where 0 is a special value.
        hint: further advice for the error message, such as "0.1 to 0.5 is usual".
        used_by: the settings under which this one has a meaning, such as "parallel.backend=fsdp2"; empty: always.
        no_effect: the setting changes how a run is executed or watched, never its result; a resumed run may change it.
    """

    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    zero: str = ""
    hint: str = ""
    used_by: str = ""
    no_effect: bool = False

    def allows(self, value: Any) -> bool:
        """True if `value`, and every element of a list or mapping, lies within the bounds."""
        if isinstance(value, Mapping):
            return all(map(self.allows, value.values()))
        if isinstance(value, (list, tuple)):
            return all(map(self.allows, value))
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def bounds(self) -> str:
        """The bounds in words, such as "0 (automatic) or more"; empty where there are none."""
        low = "" if self.ge is None else _shown(self.ge)
        if self.zero and low == "0":
            low = f"0 ({self.zero})"
        high = f"at most {_shown(self.le)}" if self.le is not None else "" if self.lt is None else f"below {_shown(self.lt)}"
        if self.gt is not None:
            above = "positive" if self.gt == 0 and not high else f"above {_shown(self.gt)}"
            return f"{above} and {high}" if high else above
        if low and high:
            return f"{low} to {_shown(self.le)}" if self.le is not None else f"{low} or more and {high}"
        if low:
            return f"{low} or more" if self.ge == 0 else f"at least {low}"
        return high

    def way_out(self) -> str:
        """The second half of the error message for a value out of bounds."""
        bounds = "a positive number" if self.bounds() == "positive" else self.bounds()
        if bounds.startswith("above"):
            bounds = f"a number {bounds}"
        return f"use {bounds}{f'; {self.hint}' if self.hint else ''}."


def setting(default: Any, *, help: str, **rule: Any) -> Any:
    """Return a dataclass field with a default value, a help text and the bounds that `Rule` lists."""
    metadata = {"rule": Rule(help, **rule)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """Base of a frozen dataclass of settings; `prefix` is the first part of their keys."""

    prefix: ClassVar[str] = ""

    def __init_subclass__(cls, prefix: str = "", **more: Any) -> None:
        super().__init_subclass__(**more)
        if prefix:  # otherwise that of the base class
            cls.prefix = f"{prefix}."

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            rule: Rule | None = f.metadata.get("rule")
            value = getattr(self, f.name)
            if rule is not None and not rule.allows(value):
                shown = list(value.values()) if isinstance(value, Mapping) else value  # names may be URLs with secrets
                raise ConfigError(f"{self.prefix}{f.name} is {shown!r}; {rule.way_out()}")

    def require(self, condition: bool, name: str, way_out: str) -> None:
        """Raise ConfigError about the setting `name` of this section unless `condition` holds."""
        require(condition, f"{self.prefix}{name}", getattr(self, name), way_out)
