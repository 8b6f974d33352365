"""The keys of a configuration: `section.name` for every setting, with those of the method that a run has."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

from clae_dist.config import Config, MethodSettings
from clae_dist.config.rules import Rule
from clae_dist.methods import method_class


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"data.image_size": 32, …} for a Config or one of its parts, in the order of definition."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{f.name}."))
        else:
            flat[prefix + f.name] = value
    return flat


Fields = dict[str, tuple[dataclasses.Field[Any], Any]]


@functools.cache
def fields_with(method: str) -> Fields:
    """Dotted key -> (field, resolved type) of every setting of a run with that `method.name`. Raises ConfigError."""
    return _fields(Config, method_class(method).Settings)


def _fields(cls: type, method: type[MethodSettings], prefix: str = "") -> Fields:
    hints = {**typing.get_type_hints(cls), **({} if prefix else {"method": method})}
    leaves: Fields = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            leaves.update(_fields(hints[f.name], method, f"{prefix}{f.name}."))
        else:
            leaves[prefix + f.name] = (f, hints[f.name])
    return leaves


FIELDS = fields_with(Config().method.name)
# Old keys and what replaced them.
MOVED = {
    **{f"attack.{name}": f"method.{name}" for name in ("alpha", "anchor", "fraction", "every", "start_epoch")},
    "attack.cost": "method.cost (exact, original), or method.name=clae_fused instead of fused",
}


def shapes_result(key: str, config: Config | None = None) -> bool:
    """True if another value of this key of `config` can change the result of a run, not only how it is executed."""
    fields = FIELDS if config is None else fields_with(config.method.name)
    rule: Rule | None = fields[key][0].metadata.get("rule")
    return rule is None or not rule.no_effect
