"""One step of the preset `clae-original` against the paper's formulas, written out in tests/reference.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.config import Batch, Data, Train
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.look import look
from clae_dist.contrast.step import pretrain_step
from clae_dist.data.loader import LoadedBatch as ViewBatch
from clae_dist.parallel.ddp import DdpBackend
from clae_dist.recipe import resolve
from clae_dist.training.clock import Clock
from clae_dist.training.pretraining import make_pretraining
from clae_dist.world import World
from tests import reference
from tests.networks import small_model

RECIPE = Path(__file__).parents[2] / "configs" / "cifar10" / "clae-original.yaml"
N, SIDE = 5, 8


def test_one_step_of_clae_original(monkeypatch) -> None:
    config, _ = resolve(RECIPE)
    config = replace(config, data=Data(image_size=SIDE), batch=Batch(global_size=N), train=Train(precision="float64"))
    assert config.model.mean == config.model.std == (0.5, 0.5, 0.5)
    assert config.model.initial_weights == "torch"
    world = World.single("cpu")
    model = small_model("batch", 3)
    initial = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    backend = DdpBackend(config, model.train(), world)
    run = make_pretraining(config, world, backend, Clock(world.device))
    x, y = (torch.rand(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2))
    seen = []
    embed = backend.embed

    def watched(images: torch.Tensor, *how: Any) -> torch.Tensor:
        seen.append(images)
        return embed(images, *how)

    monkeypatch.setattr(backend, "embed", watched)
    metrics = pretrain_step(replace(run, augment=lambda batch: (x, y)), ViewBatch(*[torch.empty(0)] * 4, {}), Moment())

    wanted_loss, wanted_delta = reference.clae_loss_and_delta(initial, x, y, 0.03, 0.5, 0.5, 0.5, 1.0)
    assert abs(metrics.loss - wanted_loss) < 1e-12  # float64: only the order of summation differs
    delta = seen[2] - x
    assert torch.equal(delta.sign(), wanted_delta.sign())
    torch.testing.assert_close(delta, wanted_delta, atol=1e-15, rtol=0)
    torch.testing.assert_close(delta.abs().max(), torch.tensor(0.015, dtype=torch.float64))  # 3.83/255: beyond [0, 1] too
    assert seen[2].max() > 1

    # Adam's first step (Kingma & Ba 2015): m̂ = g, √v̂ = |g|.
    wanted_loss.backward()
    for name, parameter in model.named_parameters():
        gradient = initial[name].grad
        assert gradient is not None
        wanted = initial[name] - 3e-4 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter, wanted, atol=1e-10, rtol=0)

    # Two attack forwards and the training forward each moved the adversarial statistics by 0.01; only two the clean ones.
    norms = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    adversarial = next(m for name, m in norms.items() if "adversarial" in name)
    clean = next(m for name, m in norms.items() if "clean" in name)
    assert adversarial.momentum == 0.01
    assert adversarial.num_batches_tracked == 3
    assert clean.num_batches_tracked == 2
    means = [
        torch.nn.functional.conv2d((image - 0.5) / 0.5, initial["encoder.conv.weight"], padding=1, stride=2).mean((0, 2, 3))
        for image in (x, x, seen[2])
    ]
    running = torch.zeros_like(means[0])
    for mean in means:
        running = 0.99 * running + 0.01 * mean
    torch.testing.assert_close(adversarial.running_mean, running.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("cost", "moves"), [("original", 3), ("exact", 2)])
def test_how_often_a_step_moves_the_adversarial_statistics(cost: str, moves: int) -> None:
    """`exact` has one attack forward, so with attack.statistics=updated its adversarial running statistics are others."""
    config, _ = resolve(RECIPE, [f"method.cost={cost}"])
    config = replace(config, data=Data(image_size=SIDE), batch=Batch(global_size=N), train=Train(precision="float64"))
    world = World.single("cpu")
    backend = DdpBackend(config, small_model("batch", 3).train(), world)
    run = make_pretraining(config, world, backend, Clock(world.device))
    x, y = (torch.rand(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2))
    pretrain_step(replace(run, augment=lambda batch: (x, y)), ViewBatch(*[torch.empty(0)] * 4, {}), Moment())
    norms = {name: m for name, m in backend.model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert [m.num_batches_tracked for name, m in norms.items() if "adversarial" in name] == [moves]
    assert [m.num_batches_tracked for name, m in norms.items() if "clean" in name] == [2]


@pytest.mark.parametrize(
    ("flavour", "wanted"),
    [("clae", (3.825,) * 3), ("clae-plain", (1.5476, 1.5254, 1.5377)), ("clae-uel", (1.5476, 1.5254, 1.5377))],
)
def test_each_flavour_has_its_own_epsilon(flavour: str, wanted: tuple[float, ...]) -> None:
    """0.03 in units of the standard deviation that each flavour's code normalises by; here in pixels of 255."""
    config, _ = resolve(RECIPE.with_name(f"{flavour}-original.yaml"))
    config = replace(config, data=Data(image_size=SIDE), batch=Batch(global_size=N), train=Train(precision="float64"))
    world = World.single("cpu")
    backend = DdpBackend(config, small_model("batch", 3, std=0.5).train(), world)
    backend.model.std.copy_(torch.tensor(config.model.std).view(1, 3, 1, 1))
    run = make_pretraining(config, world, backend, Clock(world.device))
    x, y = (torch.rand(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2))
    with backend.untouched():
        (attacked,) = look(run, None, x, y).attacks
    largest = 255 * (attacked.found.images - x).abs().amax((0, 2, 3))
    torch.testing.assert_close(largest, torch.tensor(wanted, dtype=torch.float64), atol=1e-3, rtol=0)
