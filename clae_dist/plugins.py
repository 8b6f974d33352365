"""Methods and objectives that are not part of this package: `package.module:Class`, `package.module:function`.

They are imported from an installed package or from a file beside the recipe. A run records the digest of their source.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from clae_dist.errors import ConfigError

PLUGIN_KEYS = ("method.name", "objective.name")


class AnyPlugin:
    """A container of every name: the user trusts the file that names plug-ins."""

    def __contains__(self, name: object) -> bool:
        return True


def is_plugin(name: str) -> bool:
    """True if `name` is of the form package.module:attribute."""
    return ":" in name


def is_loaded(name: str) -> bool:
    """True if the module of a plug-in was imported in this process already."""
    return name.partition(":")[0] in sys.modules


def find_beside(recipe: Path, names: Iterable[str]) -> None:
    """Let plug-ins be imported from files beside `recipe`, by this process and by the ranks that it starts.

    The folder comes last on the import path: it hides no installed module.
    """
    folder = recipe.resolve().parent
    for name in filter(is_plugin, names):
        top = name.partition(":")[0].partition(".")[0]
        if not ((folder / f"{top}.py").is_file() or (folder / top).is_dir()) or str(folder) in sys.path:
            continue
        sys.path.append(str(folder))
        before = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [before, str(folder)]))


def source_digests(names: Iterable[str]) -> dict[str, str]:
    """sha256 of the source file of each plug-in among `names`. Raises ConfigError for one without a source file."""
    digests = {}
    for name in filter(is_plugin, names):
        module = name.partition(":")[0]
        try:
            spec = importlib.util.find_spec(module)
            digests[name] = hashlib.sha256(Path(str(spec and spec.origin)).read_bytes()).hexdigest()
        except (ImportError, OSError) as error:
            raise ConfigError(
                f"the source of {name!r} cannot be read ({error}); install it, or put it beside the recipe."
            ) from None
    return digests
