"""What wraps the encoder across ranks. One file a backend; nothing outside this package knows which one runs."""

from __future__ import annotations

import importlib

from clae_dist.config import Config
from clae_dist.models import PretrainModel
from clae_dist.parallel.backend import Backend
from clae_dist.world import World

__all__ = ["Backend", "make_backend"]

_BACKENDS = {"ddp": "DdpBackend", "fsdp2": "Fsdp2Backend", "deepspeed": "DeepSpeedBackend"}


def make_backend(config: Config, model: PretrainModel, world: World) -> Backend:
    """The backend that `parallel.backend` names, around `model` (moved to the rank's device).

    Raises ConfigError for what it cannot honour, and where it is not installed.
    """
    name = config.parallel.backend
    module = importlib.import_module(f"clae_dist.parallel.{name}")
    backend: Backend = getattr(module, _BACKENDS[name])(config, model, world)
    return backend
