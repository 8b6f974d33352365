"""Conversion of values as YAML has them to the types of settings."""

from __future__ import annotations

import difflib
import sys
import types
import typing
from typing import Any, Literal

from clae_dist import core_yaml
from clae_dist.errors import ConfigError
from clae_dist.redact import redact_word


def convert(key: str, value: Any, hint: Any, origin: str) -> Any:
    """Convert `value` to the type of `key`. Raises ConfigError with the expected form."""

    def refuse(expected: str) -> typing.NoReturn:
        raise ConfigError(f"{redact_word(key)} is {redact_word(repr(value))} ({origin}); expected {expected}.")

    kind = typing.get_origin(hint)
    if kind is Literal:
        choices = typing.get_args(hint)
        if value is None and "none" in choices:
            return "none"
        if isinstance(value, (list, tuple)) and any("+" in choice for choice in choices):  # several names: mlflow+tensorboard
            value = "+".join(sorted(map(str, value)))
        if value not in choices:
            close = difflib.get_close_matches(str(value), choices, n=1)
            refuse(f"one of {', '.join(choices)}" + (f" (did you mean {close[0]}?)" if close else ""))
        return value
    if kind is tuple:
        inner = typing.get_args(hint)
        if inner[-1] is Ellipsis:
            if not isinstance(value, (list, tuple)):
                refuse("a list, such as [json, txt]")
            return tuple(convert(f"{key}[{i}]", item, inner[0], origin) for i, item in enumerate(value))
        if not isinstance(value, (list, tuple)) or len(value) != len(inner):
            refuse(f"a list of {len(inner)} numbers, such as [{', '.join(['0.5'] * len(inner))}]")
        return tuple(convert(f"{key}[{i}]", item, inner[i], origin) for i, item in enumerate(value))
    if kind is dict:
        if not isinstance(value, dict) or None in value.values():
            refuse("a mapping with a space after each colon, such as {/data/more: 0.25}")
        return {str(name): convert(f"{key}[{name}]", item, typing.get_args(hint)[1], origin) for name, item in value.items()}
    assert not isinstance(hint, types.UnionType), f"{key}: no unions in Config"
    if hint is bool:
        return value if isinstance(value, bool) else refuse("true or false")
    if hint is str:
        return "" if value is None else value if isinstance(value, str) else refuse("a string")
    if hint is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and abs(value) >= 2**64:
            refuse("a 64-bit integer")
        return value if isinstance(value, int) and not isinstance(value, bool) else refuse("an integer")
    if isinstance(value, str):
        parts = [part.strip() for part in value.split("/")]  # 4/255, as papers write it
        if len(parts) != 2 or not all(core_yaml.NUMBER.fullmatch(part) for part in parts) or not float(parts[1]):
            refuse("a number, such as 0.25, 1e-3 or 8/255")
        value = float(parts[0]) / float(parts[1])
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        refuse("a finite number")
    return float(value)
