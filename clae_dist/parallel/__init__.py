"""Backends that wrap the model across ranks, one file each; nothing outside this package asks which one is in use."""

from __future__ import annotations

import importlib

from clae_dist.config import Config
from clae_dist.models import PretrainModel
from clae_dist.parallel.backend import Backend
from clae_dist.world import World

__all__ = ["Backend", "make_backend"]

_BACKENDS = {"ddp": "DdpBackend", "fsdp2": "Fsdp2Backend", "deepspeed": "DeepSpeedBackend"}


def make_backend(config: Config, model: PretrainModel, world: World) -> Backend:
    """Wrap `model`, moved to the rank's device, in the backend that `parallel.backend` names.

    Raises ConfigError if the backend is not installed or does not support a setting.
    """
    name = config.parallel.backend
    module = importlib.import_module(f"clae_dist.parallel.{name}")
    backend: Backend = getattr(module, _BACKENDS[name])(config, model, world)
    return backend
