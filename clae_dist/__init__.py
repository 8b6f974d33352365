"""Contrastive learning with adversarial examples (CLAE) on a global batch, at scale.

The names in `__all__` are imported when they are first used, so that `import clae_dist` takes neither torch nor numpy.
clae_dist/README.md has an example.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clae_dist.api import TrainResult, evaluate, load_config, train
    from clae_dist.data.images import open_dataset
    from clae_dist.deploy.embedding import embed
    from clae_dist.deploy.encoder import Encoder, load_encoder
    from clae_dist.errors import ClaeError, ConfigError, DataError

__version__ = "0.1.0"

__all__ = [
    "ClaeError",
    "ConfigError",
    "DataError",
    "Encoder",
    "TrainResult",
    "embed",
    "evaluate",
    "load_config",
    "load_encoder",
    "open_dataset",
    "train",
]

_MODULES = {
    "clae_dist.api": ("TrainResult", "evaluate", "load_config", "train"),
    "clae_dist.data.images": ("open_dataset",),
    "clae_dist.deploy.embedding": ("embed",),
    "clae_dist.deploy.encoder": ("Encoder", "load_encoder"),
    "clae_dist.errors": ("ClaeError", "ConfigError", "DataError"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clae_dist' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
