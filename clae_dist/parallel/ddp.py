"""DistributedDataParallel: every rank holds the model; gradients are averaged over ranks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clae_dist.config import Config
from clae_dist.models import PretrainModel
from clae_dist.models.norms import ROUTES, Route, route_parameters, untouched_statistics
from clae_dist.parallel.optim import make_optimizer
from clae_dist.world import World

# Broadcasting buffers before a forward would overwrite what an earlier forward of the same backward has saved.
_SIGNATURE = inspect.signature(DistributedDataParallel.__init__).parameters
_LEAVE_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _SIGNATURE else "broadcast_buffers": False
}


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """The precision that a run uses, and why."""
    if wanted != "auto":
        return wanted, "asked for"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        reason = f"auto: compute capability {major}.{minor}"
        return ("bfloat16", reason) if major >= 8 else ("float32", reason)
    return "float32", "auto: CPU"


class DdpBackend:
    """Backend (contrast/step.py) over DDP; a single process goes without the wrapper."""

    def __init__(self, config: Config, model: PretrainModel, world: World) -> None:
        # Interleaved channels: on this project's CPUs a third faster than planes, and what tensor cores want.
        self.model = model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.precision, self.precision_reason = choose_precision(config.train.precision, world.device)
        self.optimizer = make_optimizer(config.optim, config.learning_rate(), self.model)
        self._clip_norm = config.optim.clip_norm
        self._local_statistics = config.model.norm == "local"
        self._world = world
        self._routes_used: set[Route] = set()
        self._wrapped: nn.Module = self.model
        if world.group is not None:
            devices = [world.device] if world.device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(
                self.model, device_ids=devices, process_group=world.group, gradient_as_bucket_view=True, **_LEAVE_BUFFERS
            )
            self._settle_buckets(config.data.image_size)

    def _settle_buckets(self, image_size: int) -> None:
        """DDP orders its buckets anew after the first backward, and the order decides the last bit of a sum over ranks.

        One backward on blank images before training settles it, so that a resumed run adds in the order of the first.
        """
        blank = torch.zeros(2, 3, image_size, image_size, device=self._world.device, dtype=next(self.model.parameters()).dtype)
        with untouched_statistics(self.model):
            for _ in range(2):  # the second forward rebuilds the buckets
                self.backward(sum((self.embed(blank, route).sum() for route in ("clean", *ROUTES)), blank.new_zeros(())))
        # To None, as after every step: DDP averages a gradient that it finds in its bucket by another rounding.
        self.optimizer.zero_grad()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._world.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def embed(self, images: torch.Tensor, route: Route) -> torch.Tensor:
        """Unit rows (B, D) of a training forward."""
        self._routes_used.add(route)
        with self._autocast():
            return self._wrapped(images, route)

    def attack_embed(self, images: torch.Tensor, route: Route) -> torch.Tensor:
        """The same beside the wrapper, whose bookkeeping a forward without its own backward would upset."""
        with self._autocast():
            return self.model(images, route)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of `loss`, averaged over ranks."""
        # DDP waits for every parameter: those of a route that this step left out get a gradient of zero.
        for route in set(ROUTES) - self._routes_used:
            for parameter in route_parameters(self.model, route):
                loss = loss + 0 * parameter.sum().to(loss.dtype)
        self._routes_used.clear()
        loss.backward()

    def update(self) -> torch.Tensor:
        """Clips, steps, clears; returns the norm of the gradient before clipping."""
        limit = self._clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def set_learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, on rank 0."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def average_local_statistics(self) -> None:
        """Running statistics as the mean over ranks (they differ where model.norm is "local"); before saving and evaluating."""
        if self._world.group is None or not self._local_statistics:
            return
        for buffer in self.model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self._world.mean(buffer))
