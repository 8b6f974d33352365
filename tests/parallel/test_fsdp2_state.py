"""The FSDP2 backend's types, averages and states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from clae_dist.config import Batch, Config, Data, Model, Optim, Parallel, Train
from clae_dist.models import build_model
from clae_dist.models.norms import RoutedNorm
from clae_dist.parallel.fsdp2 import Fsdp2Backend
from clae_dist.world import World
from tests.parallel.expected_steps import expected_steps, largest_difference
from tests.parallel.step_kinds import Blocks, Setup, compare, take_step, views
from tests.ranks import RankPool

TOLERANCE = 1e-10  # float64: only the order of summation differs
FLOAT64 = Train(precision="float64")


def bfloat16_batch_norm(world: World) -> str:
    """What a batch norm says in a unit that is gathered in bfloat16."""
    assert world.group is not None
    model = Blocks("batch")
    mesh = DeviceMesh.from_group(world.group, "cpu")
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    try:
        model(torch.rand(4, 3, 8, 8))
    except RuntimeError as error:
        return str(error)
    return ""


def low_precision(world: World, checkpointing: bool) -> dict[str, Any]:
    """A bfloat16 backend: what types it has where, and three steps of it and of a float32 one."""
    train = Train(precision="bfloat16", activation_checkpointing=checkpointing)
    backend = Setup(train=train).backend(world)
    seen_dtypes: dict[str, set[torch.dtype]] = {"norm": set(), "conv": set()}
    for module in backend.model.modules():
        kind = "norm" if isinstance(module, RoutedNorm) else "conv" if isinstance(module, nn.Conv2d) else ""
        if kind:
            module.register_forward_hook(
                lambda m, args, out, kind=kind: seen_dtypes[kind].update(p.dtype for p in m.parameters())
            )
    x, _ = views(world, 0, torch.float32)
    x_try = x.clone().requires_grad_()
    rows = backend.attack_embed(x_try, "clean")
    (gradient,) = torch.autograd.grad(compare(rows.detach(), rows), x_try)
    kinds = ["exact", "chunked", "plain", "fused"]
    steps = [take_step(backend, kind, number) for number, kind in enumerate(kinds)]
    other = Setup(train=Train(precision="float32")).backend(world)
    wanted = [take_step(other, kind, number) for number, kind in enumerate(kinds[:1])]
    flat = [torch.cat([g.flatten() for g in seen[0].gradients.values()]) for seen in (steps, wanted)]
    return {
        "rows": rows.detach(),
        "input": gradient.dtype,
        "forward": seen_dtypes,
        "state": {value.dtype for name, value in backend.state()["model"].items() if "num_batches" not in name},
        "gradients": {g.dtype for g in steps[0].gradients.values()},
        "cosine": torch.cosine_similarity(*flat, dim=0).item(),
        "finite": all(step.norm.isfinite() for step in steps),
    }


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "recomputed blocks"])
def test_bfloat16_keeps_float32_where_it_matters(ranks: RankPool, checkpointing: bool) -> None:
    for found in ranks.run(2, low_precision, checkpointing):
        assert found["rows"].dtype == torch.float32
        torch.testing.assert_close(found["rows"].norm(dim=1), torch.ones(len(found["rows"])))
        assert found["input"] == torch.float32
        assert found["forward"] == {"norm": {torch.float32}, "conv": {torch.bfloat16}}
        assert found["state"] == {torch.float32}
        assert found["gradients"] == {torch.float32}
        assert found["cosine"] > 0.95
        assert found["finite"]


def test_batch_norm_in_a_bfloat16_unit_raises(ranks: RankPool) -> None:
    """Why batch norms are units of their own; should torch come to allow it, they need not be."""
    assert all("type" in error for error in ranks.run(2, bfloat16_batch_norm))


# ---- averages and states ----


def averaged(world: World) -> tuple[float, float]:
    """How far the average is from the formula, and the weights inside full_model from the average."""
    decay = 0.9
    config = small_config("global", Train(precision="float64", ema_decay=decay))
    backend = Fsdp2Backend(config, build_model(config, world.group), world)
    names = dict(backend.model.named_parameters())
    wanted = {name: value for name, value in backend.state()["model"].items() if name in names}
    for seed in range(3):
        backend.backward(backend.embed(own_images(world, seed), "clean")[:, 0].mean())
        backend.update()
        weights = backend.state()["model"]
        wanted = {name: value.lerp(weights[name], 1 - decay) for name, value in wanted.items()}
    average = {name: value for name, value in backend.state()["average"].items() if name in names}
    with backend.full_model() as model:
        model.eval()
        for _ in range(world.rank):  # any number of forwards: no collective may be in them
            model(own_images(world, 0))
        whole = {name: p.detach() for name, p in model.named_parameters()}
    return largest_difference(average, wanted), largest_difference(whole, average)


def small_config(norm: str, train: Train) -> Config:
    model, optim = Model(encoder="small_resnet", norm=norm), Optim(name="sgd", warmup_epochs=0)  # type: ignore[arg-type]
    return Config(data=Data(image_size=16), batch=Batch(global_size=12), model=model, optim=optim, train=train)


def own_images(world: World, seed: int) -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(10 * seed + world.rank), dtype=torch.float64)


def test_the_average_of_parts_is_the_average(ranks: RankPool) -> None:
    for average_error, model_error in ranks.run(2, averaged):
        assert average_error < 1e-14  # float64: (1 - 0.9) in another order
        assert model_error == 0


def local_statistics(world: World) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    config = small_config("local", FLOAT64)
    backend = Fsdp2Backend(config, build_model(config, world.group), world)
    backend.embed(own_images(world, 0), "clean")
    before = backend.state()["model"]
    backend.average_local_statistics()
    return before, backend.state()["model"]


def test_local_statistics_drift_apart_and_become_their_mean(ranks: RankPool) -> None:
    (first, after), (second, after_too) = ranks.run(2, local_statistics)
    moved = [name for name in first if "clean.running_mean" in name]
    assert moved
    for name in moved:
        assert not torch.equal(first[name], second[name])
        torch.testing.assert_close(after[name], (first[name] + second[name]) / 2)
        assert torch.equal(after[name], after_too[name])


def leave_whole(world: World) -> float:
    """A forward without a backward just before an update, where parameters stay whole after a forward."""
    setup = Setup(norm="group", parallel=Parallel(backend="fsdp2", reshard_after_forward=False))
    backend = setup.backend(world)
    x, y = views(world, 0, torch.float64)
    backend.backward(compare(backend.embed(x, "clean"), backend.embed(y, "clean")))
    with torch.no_grad():
        backend.attack_embed(x, "clean")
    backend.update()
    seen = take_step(backend, "plain", 1)
    wanted, _ = expected_steps(setup, ["plain", "plain"], world.size)
    return largest_difference(seen.gradients, wanted[1].gradients)


def test_no_stale_whole_parameters(ranks: RankPool) -> None:
    assert max(ranks.run(2, leave_whole)) < TOLERANCE


def going_on(world: World, setup: Setup) -> bool:
    """Whether two steps after loading a state are, bit for bit, what they were without."""
    backend = setup.backend(world)
    take_step(backend, "exact", 0)
    state = backend.state()
    steps = [take_step(backend, kind, number) for number, kind in ((1, "chunked"), (2, "exact"))]
    fresh = setup.backend(world)
    fresh.load_state(state)
    again = [take_step(fresh, kind, number) for number, kind in ((1, "chunked"), (2, "exact"))]
    same = all(
        torch.equal(a.gradients[name], b.gradients[name]) for a, b in zip(steps, again, strict=True) for name in a.gradients
    )
    end, end_again = backend.state(), fresh.state()
    return same and all(torch.equal(value, end_again["model"][name]) for name, value in end["model"].items())


@pytest.mark.parametrize("shard_size", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_loaded_state_goes_on_bit_for_bit(ranks: RankPool, shard_size: int) -> None:
    setup = Setup(train=Train(precision="float32"), parallel=Parallel(backend="fsdp2", shard_size=shard_size))
    assert all(ranks.run(4, going_on, setup))
