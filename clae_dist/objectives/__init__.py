"""Contrastive objectives, one small file each. README.md in clae_dist/methods/ shows how to add one.

Importing this package imports no torch, and neither do the files of the built-in objectives: settings are checked without it.
"""

from __future__ import annotations

import difflib
import importlib
from functools import cache
from pathlib import Path

from clae_dist.errors import ConfigError
from clae_dist.objectives.form import Dense, PerAnchor, PerPair

__all__ = ["Dense", "PerAnchor", "PerPair", "check_name", "find", "names"]

_NOT_OBJECTIVES = ("__init__", "clusters", "dense", "form", "groups", "multi_view", "pairs", "softmax")


@cache
def names() -> tuple[str, ...]:
    """Names of the built-in objectives: the files of this folder."""
    files = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return tuple(sorted(name for name in files if name not in _NOT_OBJECTIVES))


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` is a built-in objective or of the form package.module:function; nothing is imported."""
    module, colon, attribute = name.partition(":")
    if name in names() or (colon and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        return
    close = difflib.get_close_matches(name, names(), n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ConfigError(f"objective.name is {name!r}; expected one of {', '.join(names())}, or package.module:function{hint}.")


def find(name: str) -> PerAnchor | PerPair | Dense:
    """The objective of that name, imported when it is first asked for. Raises ConfigError."""
    check_name(name)
    module, colon, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module if colon else f"{__name__}.{name}"), attribute or name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"objective.name is {name!r}, which cannot be imported ({error}).") from None
    if not isinstance(found, (PerAnchor, PerPair, Dense)):
        raise ConfigError(
            f"objective.name is {name!r}, which is not an objective; decorate the function with objective, "
            "pair_objective or dense_objective of clae_dist.objectives.form."
        )
    return found
