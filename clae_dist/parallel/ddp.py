"""DistributedDataParallel: the model is replicated on every rank; gradients are averaged over ranks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clae_dist.collectives import waiting
from clae_dist.config.method import Output, Route, Views
from clae_dist.models.norms import ROUTES, route_parameters
from clae_dist.parallel.backend import Backend
from clae_dist.parallel.named_state import State, load_optimizer_state, optimizer_pieces
from clae_dist.parallel.optim import clip_and_step, make_optimizer
from clae_dist.runs.checkpoint import Piece

# Broadcasting buffers before a forward would overwrite what an earlier forward of the same backward has saved.
_SIGNATURE = inspect.signature(DistributedDataParallel.__init__).parameters
_LEAVE_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _SIGNATURE else "broadcast_buffers": False
}


class DdpBackend(Backend):
    """Backend over DDP; a single process uses no wrapper."""

    def _wrap(self) -> None:
        self.optimizer = make_optimizer(self.config.optim, self.config.learning_rate(), self.model)
        self._used: set[str] = set()  # routes and outputs, since the last backward
        self._wrapped: nn.Module = self.model
        self._rest_of_backward = ExitStack()  # when this rank's own part is done
        if self.world.group is not None:
            devices = [self.world.device] if self.world.device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(
                self.model, device_ids=devices, process_group=self.world.group, gradient_as_bucket_view=True, **_LEAVE_BUFFERS
            )
            self._wrapped._set_ddp_runtime_logging_sample_rate(1 << 30)  # it waits for the device each time
            last = next(p for p in self.model.parameters() if p.requires_grad)  # of which the gradient comes last
            rest = self._rest_of_backward  # not self: a hook of a parameter that leads back to it is never freed
            last.register_post_accumulate_grad_hook(lambda _: rest.enter_context(waiting()))
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Run one backward on blank images, so that DDP rebuilds its buckets before training.

        DDP reorders its buckets after the first backward, and the order decides the last bit of a sum over ranks. A resumed
        run must add in the same order as the first.
        """
        # As many images as in training if blocks are compiled for their number; otherwise two suffice.
        count = self.config.batch.micro_size or self.config.rows_per_rank(self.world.size) if self.config.train.compile else 2
        shape = (count, 3, self.config.data.image_size, self.config.data.image_size)
        blank = torch.zeros(shape, device=self.world.device, dtype=next(self.model.parameters()).dtype)
        with self.untouched():
            for _ in range(2):  # the second forward rebuilds the buckets
                own: Output = "logits" if self.config.method.embeds == "logits" else "projections"
                outputs: dict[Route, Output] = {"classified": "logits"}
                routes = ("clean", *self.config.method.routes)
                rows = [self.embed(blank, route, outputs.get(route, own)) for route in routes]
                self.backward(sum((one.sum() for one in rows), blank.new_zeros(())))
        # To None, as after every step: DDP rounds differently when it averages a gradient that is already in its bucket.
        self.optimizer.zero_grad()

    def _shards(self) -> list[torch.Tensor]:
        return [parameter.data for parameter in self.model.parameters()]

    def embed(self, images: torch.Tensor, route: Route | Views, output: Output = "projections") -> torch.Tensor:
        """Unit rows (B, D), or logits, of a training forward."""
        self._used |= {output, *({route} if isinstance(route, str) else {one for one, _ in route})}
        with self.autocast():
            return self._wrapped(images, route, output=output)

    def reduction_held(self) -> AbstractContextManager[Any]:
        """DDP's no_sync."""
        return self._wrapped.no_sync() if isinstance(self._wrapped, DistributedDataParallel) else nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, averaged over ranks."""
        # DDP waits for every parameter: those of a route or an output that this backward does not use get a gradient of zero.
        for parameter in self._unused_parameters():
            loss = loss + 0 * parameter.sum().to(loss.dtype)
        self._used.clear()
        with self._rest_of_backward:
            loss.backward()

    def _unused_parameters(self) -> Iterator[nn.Parameter]:
        for route in ROUTES:
            if route not in self._used:
                yield from route_parameters(self.model, route)
        if self.model.classifiers is not None and "logits" not in self._used:
            yield from self.model.classifiers.parameters()

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad.detach().clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def _gradient_norm(self) -> torch.Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def _step(self, norm: torch.Tensor | None) -> torch.Tensor:
        assert norm is not None
        clip_and_step(self.optimizer, self.model, norm, self.config.optim.clip_norm)
        self.discard()
        return norm

    def discard(self) -> None:
        """Gradients are None."""
        self.optimizer.zero_grad()

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer

    def _optimizer_pieces(self) -> Iterator[Piece]:
        return optimizer_pieces(self.optimizer, self.model, self.world, self._place)

    def _load_optimizer_state(self, state: State) -> None:
        load_optimizer_state(self.optimizer, self.model, state, self._place)
