"""What a world sees in each of its first steps: losses, gradients, the attack, and the parameters after it.

# B rows on this rank, N rows on all ranks, S side of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
# A pixel's gradient below this share of the largest has a sign that rounding decides.
SIGN_NOISE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Observation:
    """One step. On the CPU, whole, on every rank."""

    loss: torch.Tensor  # of the global batch
    clean: torch.Tensor  # its part between clean views, which no gradient has touched yet
    grads: Tensors
    input_grad: torch.Tensor  # (N, 3, S, S): of the global batch's attack loss
    signs: torch.Tensor  # of δ, for the images that are attacked
    attacked: torch.Tensor  # the images that training then saw of them
    params_after: Tensors


@dataclass(frozen=True)
class Start:
    """Where a step begins that is compared: the reference's state, and the pixels of its attack whose sign rounding decides."""

    state: dict[str, Any]  # as Backend.state returns it; empty for the first step, whose weights come from the seed
    attacked: torch.Tensor  # the reference's attacked images, in the order of rows
    undecided: torch.Tensor  # of the same shape: true where the gradient is too small for its sign to mean anything


def global_batch(step: int, rows: int, side: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views (N, 3, S, S) in [0, 1] of images that are made up: coarse fields of colour, with noise of its own a view."""
    draw = _seeded(1 + step)
    fields = F.interpolate(torch.rand(rows, 3, 4, 4, generator=draw), size=(side, side), mode="bilinear")
    x, y = (0.1 + 0.6 * fields + 0.2 * torch.rand(fields.shape, generator=draw) for _ in range(2))
    return x.to(dtype), y.to(dtype)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class _Watched(TrainingEncoding):
    """Keeps the images that training attacked. With `start`, undecided pixels are the reference's.

    Otherwise one sign that rounding has flipped, a whole 2ε in one pixel, would show in every gradient of the step.
    """

    attacked: torch.Tensor | None = None
    start: Start | None = None
    rank = 0

    def embed(
        self, images: torch.Tensor, route: Route, want_image_gradient: bool = False, beside: Embedding | None = None
    ) -> Embedding:
        if route == "adversarial":
            self.attacked = images.detach().cpu()
            if self.start is not None:
                rows = slice(self.rank * len(images), (self.rank + 1) * len(images))
                reference, undecided = (part[rows].to(images.device) for part in (self.start.attacked, self.start.undecided))
                images = torch.where(undecided, reference.to(images.dtype), images.detach())
        return super().embed(images, route, want_image_gradient, beside)


class _Run:
    """Training on made-up images under config's backend, a step at a time. All of it is collective."""

    def __init__(self, config: Config, world: World) -> None:
        self._config, self._world = config, world
        self._backend = make_backend(config, build_model(config, world.group, on_gpu=world.device.type == "cuda"), world)
        self._backend.model.train()
        self._encoding = _Watched(self._backend, config.batch.micro_size)
        self._encoding.rank = world.rank
        self._run = replace(
            make_pretraining(config, world, self._backend, Clock(world.device)),
            encoding=self._encoding,
            augment=lambda batch: batch[:2],
            noise=lambda batch: batch[2],
        )

    def state(self) -> dict[str, Any]:
        return self._backend.state()

    def load(self, state: dict[str, Any]) -> None:
        if state:
            self._backend.load_state(state)

    def step(self, number: int, start: Start | None = None) -> Observation:
        """Step `number`, from `start` or from where the one before has ended."""
        config, world, backend, encoding = self._config, self._world, self._backend, self._encoding
        encoding.attacked, encoding.start = None, start
        if start is not None:
            self.load(start.state)
        torch.manual_seed(number)
        dtype = torch.float64 if config.train.precision == "float64" else torch.float32
        side, size = config.data.image_size, config.batch.global_size
        x, y = (self._own(view) for view in global_batch(number, size, side, dtype))
        noise = self._own(torch.rand((size, *x.shape[1:]), generator=_seeded(number), dtype=dtype))
        with backend.untouched():
            gradient = _input_gradient(self._run, x, y, noise)
        grads = _keep_gradients(backend)
        backend.set_learning_rate(config.learning_rate())
        metrics = pretrain_step(self._run, (x, y, noise), config.attack.alpha if config.attack.name != "none" else 0.0)
        loss, clean = world.mean(torch.stack([metrics.loss, metrics.clean]).double()).cpu()
        attacked = x.new_zeros(0) if encoding.attacked is None else encoding.attacked
        return Observation(
            loss=loss,
            clean=clean,
            grads=grads,
            input_grad=_everyones(gradient / world.size, world),  # the gradient contract, point 4
            signs=_everyones(_signs(config, encoding, x, y), world),
            attacked=_everyones(attacked, world),
            params_after={name: value for name, value in backend.state()["model"].items() if name in grads},
        )

    def _own(self, values: torch.Tensor) -> torch.Tensor:
        rows = self._config.rows_per_rank(self._world.size)
        return values[self._world.rank * rows : (self._world.rank + 1) * rows].to(self._world.device)


def observe(config: Config, world: World, steps: int, starts: Sequence[Start] | None = None) -> list[Observation]:
    """`steps` steps on made-up images under config's backend: each from its start, or without them freely, one after another.

    Collective. Raises ConfigError, RankError.
    """
    run = _Run(config, world)
    return [run.step(number, starts[number] if starts else None) for number in range(steps)]


def reference(config: Config, world: World, steps: int, dtype: str) -> tuple[list[Observation], list[Start]]:
    """One process in float64, and where others in `dtype` begin each of its steps: its state, rounded to that."""
    run = _Run(replace(config, train=replace(config.train, precision="float64")), world)
    observations: list[Observation] = []
    starts: list[Start] = []
    for number in range(steps):
        state = _rounded(run.state(), torch.float64 if dtype == "float64" else torch.float32) if number else {}
        run.load(state)
        one = run.step(number)
        noise = SIGN_NOISE[dtype] * float(one.input_grad.abs().max())
        undecided = one.input_grad.abs() <= noise if len(one.attacked) else torch.zeros(0, dtype=torch.bool)
        observations.append(one)
        starts.append(Start(state, one.attacked, undecided))
    return observations, starts


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    """A copy in which floating-point tensors have `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().to(dtype if value.is_floating_point() else value.dtype)
    return {key: _rounded(part, dtype) for key, part in value.items()} if isinstance(value, Mapping) else value


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
