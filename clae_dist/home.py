"""`~` and `~user` in paths that a setting names: a shell does not expand them in `run_dir=~/runs`, nor in a file."""

from __future__ import annotations

import os
import re
from typing import Any

from clae_dist.errors import ConfigError

_BEFORE = re.compile(r"(?:file:(?://)?|sqlite:///)?(?=~)")
PATHS = ("run_dir", "data.shards", "data.mixture", "data.cache", "tracking.uri")


def expand_home(key: str, value: Any, origin: str) -> Any:
    """The value of a setting with home folders in place of `~` and `~user`; values of keys that hold no path as they are.

    Raises ConfigError for a user that this machine does not have.
    """
    if key not in PATHS:
        return value
    if isinstance(value, dict):
        return {_expand_list(key, name, origin): share for name, share in value.items()}
    return _expand_list(key, value, origin)


def _expand_list(key: str, text: str, origin: str) -> str:
    return "::".join(_expand(key, part, origin) for part in text.split("::")) if "~" in text else text


def _expand(key: str, part: str, origin: str) -> str:
    before = _BEFORE.match(part)
    if before is None:
        return part
    path = part[before.end() :]
    expanded = os.path.expanduser(path)
    if expanded == path:
        name = path.partition("/")[0]
        raise ConfigError(
            f"{key} begins with {name} ({origin}), whose home folder is not known on this machine; write the full path, or "
            f"./{name} for a folder of that name."
        )
    return f"{before[0]}{expanded}"
