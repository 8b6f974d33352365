"""What a world sees in its first steps: losses, gradients, the attack, and the parameters after them.

# B rows on this rank, N rows on all ranks, S side of an image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from clae_dist.config import Config
from clae_dist.contrast.encoding import Embedding, Route, TrainingEncoding
from clae_dist.contrast.step import Pretraining, adversarial_view, attacked_rows, pretrain_step
from clae_dist.models import build_model
from clae_dist.parallel import Backend, make_backend
from clae_dist.training.clock import Clock
from clae_dist.training.pretraining import make_pretraining
from clae_dist.world import World

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Observation:
    """On the CPU, whole, on every rank; all but the parameters are of the first step."""

    loss: torch.Tensor  # of the global batch
    clean: torch.Tensor  # its part between clean views, which no gradient has touched yet
    grads: Tensors
    input_grad: torch.Tensor  # (N, 3, S, S): of the global batch's attack loss
    signs: torch.Tensor  # of δ, for the images that are attacked
    params_after: Tensors


def global_batch(step: int, rows: int, side: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views (N, 3, S, S) in [0, 1] of images that are made up: coarse fields of colour, with noise of its own a view."""
    draw = _seeded(1 + step)
    fields = F.interpolate(torch.rand(rows, 3, 4, 4, generator=draw), size=(side, side), mode="bilinear")
    x, y = (0.1 + 0.6 * fields + 0.2 * torch.rand(fields.shape, generator=draw) for _ in range(2))
    return x.to(dtype), y.to(dtype)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class _Watched(TrainingEncoding):
    """Keeps the images that training attacked."""

    attacked: torch.Tensor | None = None

    def embed(
        self, images: torch.Tensor, route: Route, want_image_gradient: bool = False, beside: Embedding | None = None
    ) -> Embedding:
        if route == "adversarial" and self.attacked is None:
            self.attacked = images.detach().cpu()
        return super().embed(images, route, want_image_gradient, beside)


def observe(config: Config, world: World, steps: int) -> Observation:
    """Trains `steps` steps on made-up images under config's backend. A collective. Raises ConfigError, RankError."""
    backend = make_backend(config, build_model(config, world.group, on_gpu=world.device.type == "cuda"), world)
    backend.model.train()
    encoding = _Watched(backend, config.batch.micro_size)
    run = replace(
        make_pretraining(config, world, backend, Clock(world.device)),
        encoding=encoding,
        augment=lambda batch: batch[:2],
        noise=lambda batch: batch[2],
    )
    rows, side = config.rows_per_rank(world.size), config.data.image_size
    dtype = torch.float64 if config.train.precision == "float64" else torch.float32
    alpha = config.attack.alpha if config.attack.name != "none" else 0.0

    def mine(values: torch.Tensor) -> torch.Tensor:
        return values[world.rank * rows : (world.rank + 1) * rows].to(world.device)

    for step in range(steps):
        torch.manual_seed(step)
        x, y = (mine(view) for view in global_batch(step, config.batch.global_size, side, dtype))
        noise = mine(torch.rand((config.batch.global_size, *x.shape[1:]), generator=_seeded(step), dtype=dtype))
        if step == 0:
            with backend.untouched():
                gradient = _input_gradient(run, x, y, noise)
            input_grad = _everyones(gradient / world.size, world)  # the gradient contract, point 4
            grads = _keep_gradients(backend)
        backend.set_learning_rate(config.learning_rate())
        metrics = pretrain_step(run, (x, y, noise), alpha)
        if step == 0:
            loss, clean = world.mean(torch.stack([metrics.loss, metrics.clean]).double()).cpu()
            signs = _everyones(_signs(config, encoding, x, y), world)
    return Observation(
        loss=loss,
        clean=clean,
        grads=grads,
        input_grad=input_grad,
        signs=signs,
        params_after={name: value for name, value in backend.state()["model"].items() if name in grads},
    )


def _input_gradient(run: Pretraining, x: torch.Tensor, y: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Of the images that are attacked, where the attack starts."""
    chosen = attacked_rows(run.attack, len(x))
    if run.attack.cost == "fused":  # the whole batch's clean loss
        return adversarial_view(run, x, y).gradient[chosen]
    start = noise[chosen] if run.attack.random_start else None
    return adversarial_view(run, x[chosen], y[chosen], noise=start).gradient


def _signs(config: Config, encoding: _Watched, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if encoding.attacked is None:
        return x.new_zeros(0)
    start = (y if config.attack.anchor == "other" else x)[attacked_rows(config.attack, len(x))]
    return (encoding.attacked - start.detach().cpu()).sign()


def _keep_gradients(backend: Backend) -> Tensors:
    """Filled at the next update, with what the optimiser is then given."""
    kept: Tensors = {}
    update = backend.update

    def keeping() -> torch.Tensor:
        kept.update({name: value.detach().cpu() for name, value in backend.gradients().items()})
        backend.update = update  # type: ignore[method-assign]
        return update()

    backend.update = keeping  # type: ignore[method-assign]
    return kept


def _everyones(rows: torch.Tensor, world: World) -> torch.Tensor:
    parts: list[Any] = world.gather_objects(rows.detach().cpu())
    return torch.cat(parts)
