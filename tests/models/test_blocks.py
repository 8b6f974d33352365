"""Blocks that are computed again, and compiled: the same numbers, statistics counted once, the right route."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clae_dist.config import Batch, Config, Data, Model, Optim, Train
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.step import pretrain_step
from clae_dist.models import build_model
from clae_dist.models.blocks import encoder_blocks
from clae_dist.parallel.ddp import DdpBackend
from clae_dist.world import World
from tests import steps
from tests.ranks import RankPool

SIDE, N = 16, 8
PLAIN = Config(
    data=Data(image_size=SIDE),
    batch=Batch(global_size=N),
    model=Model(encoder="small_resnet", projector_dim=16),
    optim=Optim(name="sgd", learning_rate=0.1, scaling="none", warmup_epochs=0),
    train=Train(precision="float64", threads=1),
)


def two_steps(world: World, config: Config) -> dict[str, torch.Tensor]:
    """The model after them: weights and running statistics."""
    backend = DdpBackend(config, build_model(config, world.group), world)
    backend.model.train()
    run = steps.pretraining(config, world, backend)
    for seed in (1, 3):
        dtype = torch.float64 if config.train.precision == "float64" else torch.float32
        x, y = (steps.share(world, steps.images(number, N, SIDE, dtype)) for number in (seed, seed + 1))
        pretrain_step(run, (x, y), Moment())
    return backend.state()["model"]


@pytest.mark.parametrize(
    ("world_size", "norm"), [(1, "global"), pytest.param(2, "local", marks=pytest.mark.slow), (2, "global")]
)
def test_recomputed_blocks_train_the_same(ranks: RankPool, world_size: int, norm: str) -> None:
    """A second forward that took the last route, counted its statistics twice, or saved other tensors than the first."""
    config = replace(PLAIN, model=replace(PLAIN.model, norm=norm))
    again = replace(config, train=replace(config.train, activation_checkpointing=True))
    for found, wanted in zip(*(ranks.run(world_size, two_steps, c) for c in (again, config)), strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=1e-12, rtol=0)  # float64, the same operations


def test_blocks_are_the_residual_and_transformer_blocks() -> None:
    names = {
        "small_resnet": 4,
        "torchvision/resnet18": 8,
        "timm/vit_tiny_patch16_224": 12,
    }
    for encoder, count in names.items():
        model = build_model(replace(PLAIN, model=Model(encoder=encoder)))
        assert len(encoder_blocks(model.encoder)) == count


def compiled_steps(world: World, config: Config) -> tuple[dict[str, torch.Tensor], int, list[str]]:
    """The model after two steps, and how many graphs torch compiled and what it says of the rest."""
    from torch._dynamo.utils import counters

    counters.clear()
    state = two_steps(world, config)
    return state, counters["stats"]["unique_graphs"], [reason for reason in counters["unimplemented"] if "recompile" in reason]


@pytest.mark.slow
def test_every_block_of_a_resnet_is_compiled(ranks: RankPool) -> None:
    """All blocks share their code, of which torch compiles 8 graphs and leaves the rest."""
    config = replace(PLAIN, train=Train(precision="float32", threads=1))
    wanted = ranks.run(1, two_steps, config)[0]
    found, graphs, left = ranks.run(1, compiled_steps, replace(config, train=replace(config.train, compile=True)))[0]
    assert graphs > 8
    assert not left
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=1e-3)  # float32, other kernels
