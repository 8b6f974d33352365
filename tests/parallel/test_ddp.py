"""What the DDP backend adds to DDP."""

from __future__ import annotations

import gc
import weakref

import torch

from clae_dist.config import Batch, Config, Data, Model, Optim
from clae_dist.models import build_model
from clae_dist.parallel.ddp import DdpBackend
from clae_dist.world import World
from tests.ranks import RankPool


def statistics(world: World, norm: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Running statistics after a forward on each rank's own images: as they are, and averaged."""
    config = Config(
        data=Data(image_size=16),
        batch=Batch(global_size=12),
        model=Model(encoder="small_resnet", norm=norm),
        optim=Optim(name="sgd"),
    )
    backend = DdpBackend(config, build_model(config, world.group), world)
    backend.model.train()
    backend.embed(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(world.rank)), "clean")
    before = [buffer.clone() for name, buffer in backend.model.named_buffers() if "running" in name]
    backend.average_local_statistics()
    return before, [buffer.clone() for name, buffer in backend.model.named_buffers() if "running" in name]


def is_freed(world: World) -> bool:
    config = Config(
        data=Data(image_size=16),
        batch=Batch(global_size=12),
        model=Model(encoder="small_resnet"),
        optim=Optim(name="sgd"),
    )
    backend = DdpBackend(config, build_model(config, world.group), world)
    images = torch.rand(4, 3, 16, 16)
    backend.backward(backend.embed(images, "clean").sum() + backend.embed(images, "adversarial").sum())
    model, weight = weakref.ref(backend.model), weakref.ref(next(backend.model.parameters()))
    del backend
    gc.collect()
    return model() is None and weight() is None


def test_a_backend_that_nobody_uses_is_freed(ranks: RankPool) -> None:
    """A hook of a parameter that led back to the backend kept every model of a process: ranks grew to gigabytes."""
    assert ranks.run(2, is_freed) == [True, True]


def test_local_statistics_differ_and_become_their_mean(ranks: RankPool) -> None:
    found = ranks.run(3, statistics, "local")
    for own in zip(*(before for before, _ in found), *(after for _, after in found), strict=True):
        for after in own[3:]:
            torch.testing.assert_close(after, sum(own[:3]) / 3)
    assert not torch.equal(found[0][0][0], found[1][0][0])


def test_global_statistics_are_the_same_bits_and_stay_so(ranks: RankPool) -> None:
    """A mean over three equal numbers may be another number: averaging them would undo bitwise resuming."""
    found = ranks.run(3, statistics, "global")
    for before, after in found:
        assert all(torch.equal(a, b) for a, b in zip(before, found[0][0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
