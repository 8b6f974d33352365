"""An encoder that draws random numbers (dropout, stochastic depth), a few rows at a time: both passes draw the same ones.

Compared with plain autograd: the same forwards in the same order from the same seed, every graph kept, one backward.
N rows of the global batch, B = N / W a rank, m rows at a time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from clae_dist.config import Batch, Config, Data, Objective, Optim, Parallel, Train
from clae_dist.contrast import encoding
from clae_dist.contrast.adversary import LossAndGradient
from clae_dist.contrast.encoding import Embedding, LossOf, Route, TrainingEncoding, Update, _Part
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.step import pretrain_step
from clae_dist.methods.clae_fused import ClaeFused
from clae_dist.methods.simclr import SimClr
from clae_dist.models.model import PretrainModel, mlp
from clae_dist.models.norms import random_layers
from clae_dist.parallel import make_backend
from clae_dist.training.pretraining import seed_step
from clae_dist.world import World
from tests import steps
from tests.ranks import RankPool

N, SIDE, WIDTH = 12, 8, 8
TOLERANCE = 1e-10  # float64: only the order of summation differs
X, Y = steps.images(1, N, SIDE), steps.images(2, N, SIDE)
NOISE = torch.rand(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


class Residual(nn.Module):
    """x + a convolution that is dropped for half of the rows, then dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop_path, self.dropout = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), DropPath(0.5), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x + self.drop_path(torch.relu(self.conv(x))))


class Drawing(nn.Module):
    """A stem and two residual blocks, none with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1)
        self.layers = nn.Sequential(Residual(), Residual())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.tanh(self.stem(x))).mean((2, 3))


class OnePass(TrainingEncoding):
    """The reference: every forward keeps its graph, and one backward goes through all of them."""

    def embed(
        self, images: torch.Tensor, route: Route, want_image_gradient: bool = False, beside: Embedding | None = None
    ) -> Embedding:
        parts = [
            _Part(part, self.backend.embed(part, route), []) for part in self._split(images, as_leaves=want_image_gradient)
        ]
        return Embedding(torch.cat([part.graph for part in parts]).detach().requires_grad_(), route, tuple(parts))  # type: ignore[misc]

    def input_gradient(self, images: torch.Tensor, route: Route, loss_of: LossOf) -> LossAndGradient:
        with torch.enable_grad():
            parts = self._split(images, as_leaves=True)
            loss = loss_of(torch.cat([self.backend.attack_embed(part, route) for part in parts]))
            return loss.detach(), torch.cat(torch.autograd.grad(loss, parts))


def settings(variant: steps.Variant, backend: str, recompute: bool = False) -> Config:
    return Config(
        data=Data(image_size=SIDE),
        batch=Batch(global_size=N, micro_size=3),
        objective=Objective(temperature=0.2),
        method=variant.method,
        attack=variant.attack,
        optim=Optim(name="sgd", warmup_epochs=0),
        train=Train(precision="float64", activation_checkpointing=recompute),
        parallel=Parallel(backend=backend),  # type: ignore[arg-type]
    )


def run_step(world: World, config: Config, way: str) -> dict[str, torch.Tensor]:
    """Loss, gradients and the last view (the attacked one, if any) of a step. `way` is "ours", "one pass" (the reference) or
    "drawing anew" (wrong)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = PretrainModel(Drawing(), WIDTH, mlp(WIDTH, 8, 6), 6, (0.5,) * 3, (0.5,) * 3).double().train()
        assert len(random_layers(model)) == 4
        backend = make_backend(config, model, world)
        run = steps.pretraining(config, world, backend, NOISE)
        if way == "one pass":
            run = replace(run, encoding=OnePass(backend, config.batch.micro_size))
        seen: list[torch.Tensor] = []
        embed, update = run.encoding.embed, backend.update
        result: dict[str, torch.Tensor] = {}

        def watched(images: torch.Tensor, *settings: Any, **more: Any) -> Embedding:
            seen.append(images.detach())
            return embed(images, *settings, **more)

        def kept(loss: torch.Tensor | None = None) -> Update:
            result.update(backend.gradients())
            return update(loss)

        run.encoding.embed, backend.update = watched, kept  # type: ignore[method-assign]
        right = encoding._drawing_again
        if way == "drawing anew":
            encoding._drawing_again = drawing_anew  # type: ignore[assignment]
        try:
            seed_step(config, 5, world.rank)
            metrics = pretrain_step(run, (steps.share(world, X), steps.share(world, Y)), Moment())
        finally:
            encoding._drawing_again = right
        return {**result, "loss": metrics.loss, "last view": seen[-1], "next draw": torch.rand(4)}


def drawing_anew(state: list[torch.Tensor], device: torch.device) -> AbstractContextManager[None]:
    """The mistake: the second pass draws on where the first ended."""
    return nullcontext()


FGSM = steps.variant()
ATTACKS = {
    "fgsm": FGSM,
    "pgd": steps.variant(attack_name="pgd", steps=2, step_size=0.02, random_start=True),
    "fused": steps.variant(ClaeFused.Settings),
    "none": steps.variant(SimClr.Settings),
}


def largest_difference(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    assert [set(rank) for rank in one] == [set(rank) for rank in other]
    return {name: max((a[name] - b[name]).abs().max().item() for a, b in zip(one, other, strict=True)) for name in one[0]}


@pytest.mark.parametrize("attack", list(ATTACKS))
@pytest.mark.parametrize(("backend", "world_size"), [("ddp", 1), ("ddp", 2), ("fsdp2", 2)])
def test_micro_batches_with_random_layers_are_exact(ranks: RankPool, backend: str, world_size: int, attack: str) -> None:
    config = settings(ATTACKS[attack], backend)
    ours, one_pass = (ranks.run(world_size, run_step, config, way) for way in ("ours", "one pass"))
    assert max(grad.abs().max() for grad in one_pass[0].values()) > 1e-3  # there is something to compare
    found = largest_difference(ours, one_pass)
    assert max(found.values()) < TOLERANCE, found  # "next draw": the second pass leaves the generator where it was


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_recomputed_blocks_draw_the_same_as_well(ranks: RankPool, backend: str) -> None:
    config = settings(FGSM, backend, recompute=True)
    ours, one_pass = (ranks.run(2, run_step, config, way) for way in ("ours", "one pass"))
    found = largest_difference(ours, one_pass)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_drawing_anew_is_caught(ranks: RankPool, backend: str) -> None:
    """Guards against a second pass that draws other random numbers: the loss is right, gradients and δ are not."""
    config = settings(FGSM, backend)
    wrong, right = (ranks.run(2, run_step, config, way) for way in ("drawing anew", "one pass"))
    found = largest_difference(wrong, right)
    assert found["projector.0.weight"] > 1e-3
    assert found["last view"] > 1e-3


def test_ranks_draw_different_numbers() -> None:
    def draw(rank: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            seed_step(settings(FGSM, "ddp"), 5, rank)
            return torch.rand(4)

    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(1), draw(1))
