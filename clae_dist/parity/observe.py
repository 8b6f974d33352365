"""Observe the first steps of a world: losses, gradients, attacks, and the parameters after each step.

# B rows on this rank, N rows on all ranks, S side of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from clae_dist.config import Config
from clae_dist.contrast.attacks import Attacked
from clae_dist.contrast.encoding import Update
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.look import Look, look
from clae_dist.contrast.step import TrainingStep, pretrain_step
from clae_dist.data.loader import num_views_of
from clae_dist.models import build_model
from clae_dist.parallel import Backend, make_backend
from clae_dist.training.clock import Clock
from clae_dist.training.pretraining import make_pretraining
from clae_dist.world import World

Tensors = dict[str, torch.Tensor]
# A pixel's gradient below this share of the largest has a sign that rounding decides.
SIGN_NOISE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 5e-2}


def sign_noise(gradient: torch.Tensor, dtype: str) -> float:
    """The size below which rounding in `dtype` decides the sign of a gradient's element."""
    return SIGN_NOISE[dtype] * float(gradient.abs().max()) if gradient.numel() else 0.0


@dataclass(frozen=True)
class Observation:
    """One step, with unsharded tensors on the CPU, equal on every rank."""

    loss: torch.Tensor  # of the global batch
    clean: torch.Tensor  # its first term, between clean views, which depends on no gradient
    grads: Tensors
    input_grad: torch.Tensor  # (n, 3, S, S): of the global batch's attack loss at the start of the attack; n 0: no attacks
    signs: torch.Tensor  # of δ
    attacked: torch.Tensor  # the attacked images
    params_after: Tensors


@dataclass(frozen=True)
class Start:
    """The start of a compared step: the reference's state, and the pixels of its attack whose sign rounding decides."""

    state: dict[str, Any]  # as Backend.state returns it; empty for the first step, whose weights come from the seed
    attacked: torch.Tensor  # the reference's attacked images, in the order of rows
    undecided: torch.Tensor  # of the same shape: true where the gradient is so small that its sign is arbitrary


def global_batch(step: int, rows: int, side: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Three views (N, 3, S, S) in [0, 1] of synthetic images: coarse fields of colour, with different noise in each view."""
    draw = _seeded(1 + step)
    fields = F.interpolate(torch.rand(rows, 3, 4, 4, generator=draw), size=(side, side), mode="bilinear")
    return [(0.1 + 0.6 * fields + 0.2 * torch.rand(fields.shape, generator=draw)).to(dtype) for _ in range(3)]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class _Batch(NamedTuple):
    """This rank's rows of a synthetic global batch."""

    views: list[torch.Tensor]
    noises: list[torch.Tensor]
    labels: torch.Tensor
    ids: torch.Tensor


class _Watched(TrainingStep):
    """A step that records its attacks. With `start`, undecided pixels are taken from the reference.

    Otherwise one sign flipped by rounding, a change of 2ε in one pixel, would change every gradient of the step.
    """

    start: Start | None = None

    def _record(self, attacked: Attacked) -> torch.Tensor:
        before = sum(len(one.start) for one in self.attacks)
        images = super()._record(attacked)
        if self.start is None:
            return images
        world = self.run.world
        # The attacks of a step follow one another, each in the order of ranks.
        first = before * world.size + world.rank * len(images)
        reference, undecided = (
            part[first : first + len(images)].to(images.device) for part in (self.start.attacked, self.start.undecided)
        )
        return torch.where(undecided, reference.to(images.dtype), images)


class SyntheticRun:
    """Training on synthetic images under the backend of the settings, step by step. Collective."""

    def __init__(self, config: Config, world: World) -> None:
        self._config, self._world = config, world
        self.backend = make_backend(config, build_model(config, world.norm_group(config.model.norm_group)), world)
        self.backend.model.train()
        self._run = replace(
            make_pretraining(config, world, self.backend, Clock(world.device)),
            augment=lambda batch: tuple(batch.views),
            noise=lambda batch, view: batch.noises[view],
        )

    def state(self) -> dict[str, Any]:
        return self.backend.state()

    def load(self, state: dict[str, Any]) -> None:
        if state:
            self.backend.load_state(state)

    def step(self, number: int, start: Start | None = None) -> Observation:
        """Step `number`, from `start` or from the end of the previous step."""
        config, world, backend = self._config, self._world, self.backend
        if start is not None:
            self.load(start.state)
        torch.manual_seed(number)
        batch = self._batch(number)
        grads = _keep_gradients(backend)
        backend.set_learning_rate(config.learning_rate())
        seen: list[_Watched] = []

        def watched(*arguments: Any) -> _Watched:
            seen.append(_Watched(*arguments))
            seen[0].start = start
            return seen[0]

        metrics = pretrain_step(self._run, batch, Moment(number), watched)
        (step,) = seen
        clean = next(iter(metrics.terms.values()))
        loss, clean = world.mean(torch.stack([metrics.loss, clean]).double()).cpu()
        return Observation(
            loss=loss,
            clean=clean,
            grads=grads,
            input_grad=self._of_all(step, lambda one: one.found.gradient / world.size),  # the gradient contract, point 4
            signs=self._of_all(step, lambda one: (one.found.images - one.start).sign()),
            attacked=self._of_all(step, lambda one: one.found.images),
            params_after={name: value for name, value in backend.state()["model"].items() if name in grads},
        )

    def look(self, number: int) -> Look:
        """The losses and attacks of step `number`; nothing is trained."""
        batch = self._batch(number)
        with self.backend.untouched():
            return look(self._run, batch, *batch.views)

    def _batch(self, number: int) -> _Batch:
        config = self._config
        dtype = torch.float64 if config.train.precision == "float64" else torch.float32
        side, size = config.data.image_size, config.batch.global_size
        views = [self._own(view) for view in global_batch(number, size, side, dtype)][: num_views_of(config)]
        for crop in range(config.views.local_crops):
            whole = self._own(global_batch(1000 * (crop + 1) + number, size, side, dtype)[0])
            views.append(F.interpolate(whole, (config.local_size,) * 2, mode="area"))
        draws = [_seeded(number + 1000 * view) for view in range(len(views))]
        # Drawn in float32, whatever the precision: torch draws other numbers in float64.
        noises = [self._own(torch.rand((size, 3, side, side), generator=draw).to(dtype)) for draw in draws]
        classes = min(size // 3, config.method.num_classes or size)
        labels = self._own(torch.arange(size) % (1 + classes) - 1)  # about three images a class, and three without a label
        return _Batch(views, noises, labels, self._own(torch.arange(size)))

    def _of_all(self, step: _Watched, part: Callable[[Attacked], torch.Tensor]) -> torch.Tensor:
        """A value of every attack of the step, for the images of all ranks; empty without an attack."""
        parts = [_everyones(part(attacked), self._world) for attacked in step.attacks]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _own(self, values: torch.Tensor) -> torch.Tensor:
        rows = self._config.rows_per_rank(self._world.size)
        return values[self._world.rank * rows : (self._world.rank + 1) * rows].to(self._world.device)


def observe(config: Config, world: World, steps: int, starts: Sequence[Start] | None = None) -> list[Observation]:
    """Observe `steps` steps on synthetic images under the backend of the settings, each from its start (without: in a row).

    Collective. Raises ConfigError, RankError.
    """
    run = SyntheticRun(config, world)
    return [run.step(number, starts[number] if starts else None) for number in range(steps)]


def reference(config: Config, world: World, steps: int, dtype: str) -> tuple[list[Observation], list[Start]]:
    """The steps of one process in float64, and the start of each for worlds in `dtype`: its state, rounded to `dtype`."""
    run = SyntheticRun(replace(config, train=replace(config.train, precision="float64")), world)
    observations: list[Observation] = []
    starts: list[Start] = []
    for number in range(steps):
        state = _rounded(run.state(), torch.float64 if dtype == "float64" else torch.float32) if number else {}
        run.load(state)
        one = run.step(number)
        undecided = one.input_grad.abs() <= sign_noise(one.input_grad, dtype)
        observations.append(one)
        starts.append(Start(state, one.attacked, undecided))
    return observations, starts


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    """A copy in which floating-point tensors have `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().to(dtype if value.is_floating_point() else value.dtype)
    return {key: _rounded(part, dtype) for key, part in value.items()} if isinstance(value, Mapping) else value


def _keep_gradients(backend: Backend) -> Tensors:
    """A dictionary that the next update fills with the gradients that the optimiser receives."""
    kept: Tensors = {}
    update = backend.update

    def keeping(loss: torch.Tensor | None = None) -> Update:
        kept.update({name: value.detach().cpu() for name, value in backend.gradients().items()})
        backend.update = update  # type: ignore[method-assign]
        return update(loss)

    backend.update = keeping  # type: ignore[method-assign]
    return kept


def _everyones(rows: torch.Tensor, world: World) -> torch.Tensor:
    parts: list[Any] = world.gather_objects(rows.detach().cpu())
    return torch.cat(parts)
