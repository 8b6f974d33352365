"""What wraps the encoder across ranks. One file a backend; nothing outside this package knows which one runs."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from clae_dist.config import Config
from clae_dist.models import PretrainModel
from clae_dist.models.norms import Route
from clae_dist.parallel.ddp import DdpBackend
from clae_dist.world import World

__all__ = ["Backend", "make_backend"]


class Backend(Protocol):
    """What training asks of a backend."""

    model: PretrainModel  # the bare model, for evaluation
    precision: str
    precision_reason: str

    def embed(self, images: torch.Tensor, route: Route) -> torch.Tensor:
        """Unit rows (B, D) of a training forward."""

    def attack_embed(self, images: torch.Tensor, route: Route) -> torch.Tensor:
        """Unit rows (B, D) beside the backend's bookkeeping: for gradients with respect to the input alone."""

    def backward(self, loss: torch.Tensor) -> None:
        """Parameter gradients of `loss`, averaged over ranks."""

    def update(self) -> torch.Tensor:
        """One optimiser step; returns the gradient's norm before clipping."""

    def set_learning_rate(self, value: float) -> None: ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: {"model": …, "optimizer": …}."""

    def load_state(self, state: dict[str, Any]) -> None: ...

    def average_local_statistics(self) -> None:
        """Makes running statistics the same on all ranks. A collective."""


def make_backend(config: Config, model: PretrainModel, world: World) -> Backend:
    """The backend that `parallel.backend` names, around `model` (moved to the rank's device)."""
    return {"ddp": DdpBackend}[config.parallel.backend](config, model, world)
