"""What the DeepSpeed backend saves, loads, averages and hands out whole, at ZeRO stages 0 to 3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from clae_dist.bench.measure import replaced
from clae_dist.config import Batch, Config, Data, Model, Optim, Parallel, Train
from clae_dist.models import build_model
from clae_dist.parallel import deepspeed, make_backend
from clae_dist.world import World
from tests.parallel.step_kinds import compare, take_step, views
from tests.parallel.zero import ADAMW, EVERY_STAGE, FLOAT32, SGD, TOLERANCE, apart, backend_of, go_on, setup_of
from tests.ranks import RankPool

# From one stage to another; -1 is DDP. With MORE_MOVES, each stage loads and is loaded from.
MOVES = [(-1, 1), (1, 3), (3, -1)]
MORE_MOVES = [(-1, 0), (-1, 2), (-1, 3), (0, 3), (1, -1), (1, 2), (2, 0), (2, 3), (3, 1)]


@pytest.mark.parametrize(
    ("move", "optim"),
    [
        *((move, ADAMW) for move in MOVES),
        *(pytest.param(move, ADAMW, marks=pytest.mark.slow) for move in MORE_MOVES),
        *(pytest.param(move, SGD, marks=pytest.mark.slow) for move in (*MOVES, *MORE_MOVES)),
    ],
    ids=lambda value: value.name if isinstance(value, Optim) else f"{value[0]} to {value[1]}",
)
def test_a_run_goes_on_under_another_stage_or_backend(pair: RankPool, move: tuple[int, int], optim: Optim) -> None:
    """As the uninterrupted one under DDP, optimiser state included."""
    before, after = (setup_of(stage, optim=optim, train=replace(FLOAT32, ema_decay=0.5)) for stage in move)
    straight = pair.run(2, go_on, setup_of(-1, optim=optim, train=before.train), None, 0, ["exact", "plain", "fused", "exact"])
    half = pair.run(2, go_on, before, None, 0, ["exact", "plain"])[0]
    for state, wanted in zip(pair.run(2, go_on, after, half, 2, ["fused", "exact"]), straight, strict=True):
        for part in ("model", "average"):
            assert apart(state[part], wanted[part]) < TOLERANCE
        assert state["optimizer"].keys() == wanted["optimizer"].keys()
        for key in next(iter(wanted["optimizer"].values())):
            mine, theirs = ({name: s[key] for name, s in found["optimizer"].items()} for found in (state, wanted))
            assert apart(mine, theirs) < 10 * TOLERANCE, key  # squares of gradients


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_a_resumed_run_has_the_same_bits(pair: RankPool, stage: int) -> None:
    setup = setup_of(stage, optim=ADAMW)
    straight = pair.run(2, go_on, setup, None, 0, ["exact", "plain", "chunked", "exact"])[0]
    half = pair.run(2, go_on, setup, None, 0, ["exact", "plain"])[0]
    found = pair.run(2, go_on, setup, half, 2, ["chunked", "exact"])[0]
    assert all(torch.equal(found["model"][name], value) for name, value in straight["model"].items())
    for name, entries in straight["optimizer"].items():
        assert all(torch.equal(found["optimizer"][name][key], value) for key, value in entries.items())
    assert pair.run(2, go_on, setup, None, 0, [])[0]["optimizer"] == {}  # before the first step there is none


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_two_ranks_go_on_as_one(pair: RankPool, stage: int) -> None:
    """W 2 to 1, which is DDP's; the norm layers must not mind how many rows a rank has."""
    half = pair.run(2, go_on, setup_of(stage, "group", ADAMW), None, 0, ["exact", "plain"])[0]
    wanted = pair.run(2, go_on, setup_of(-1, "group", ADAMW), None, 0, ["exact", "plain", "exact", "plain"])[0]
    found = go_on(World.single("cpu"), setup_of(-1, "group", ADAMW), half, 2, ["exact", "plain"])
    assert apart(found["model"], wanted["model"]) < TOLERANCE


def evaluated(world: World, stage: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], bool]:
    """Features of the averaged model on one rank alone, its weights, and whether training then goes on with its own."""
    parallel = Parallel(backend="ddp") if stage < 0 else Parallel(backend="deepspeed", zero_stage=stage)
    config = Config(
        data=Data(image_size=16),
        batch=Batch(global_size=8),
        model=Model(encoder="small_resnet"),
        optim=SGD,
        train=replace(FLOAT32, ema_decay=0.5),
        parallel=parallel,
    )
    with replaced(deepspeed, _PERSISTENT=5000):  # some parameters stay whole, others do not
        backend = make_backend(config, build_model(config, world.group), world)
    backend.model.train()
    for number in range(3):
        x, y = (torch.nn.functional.interpolate(view, 16) for view in views(world, number, torch.float32))
        backend.backward(compare(backend.embed(x, "clean"), backend.embed(y, "adversarial")))
        backend.update()
    before = backend.state()
    with backend.full_model() as model:
        model.eval()
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            for _ in range(1 + world.rank):  # ranks need not run the same forwards
                features = model.features(x)
    backend.model.train()
    after = backend.state()
    kept = all(torch.equal(value, before["model"][name]) for name, value in after["model"].items())
    return features, weights, kept and apart(weights, before["average"]) == 0


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_the_averaged_model_is_whole_on_every_rank(pair: RankPool, stage: int) -> None:
    wanted = pair.run(2, evaluated, -1)
    for (features, weights, kept), (theirs, average, _) in zip(pair.run(2, evaluated, stage), wanted, strict=True):
        assert kept
        assert apart(weights, average) < TOLERANCE
        torch.testing.assert_close(features, theirs, rtol=1e-4, atol=1e-5)


def formats(world: World, stage: int) -> tuple[set[torch.dtype], float, bool]:
    """In bfloat16: types of weights and gradients, the gradient's cosine with float32's, and whether channels interleave."""
    grads, strides, types = [], set(), set()
    for precision in ("float32", "bfloat16"):
        backend = backend_of(world, setup_of(stage, "group", train=Train(precision=precision)))  # type: ignore[arg-type]
        layers: Any = backend.model.encoder.layers
        layers[0].register_forward_pre_hook(lambda module, inputs: strides.add(inputs[0].stride(1)))
        gradients = take_step(backend, "fused", 0).gradients
        grads.append(torch.cat([g.flatten() for g in gradients.values()]))
        types = {g.dtype for g in gradients.values()} | {p.dtype for p in backend.model.parameters()}
    return types, torch.nn.functional.cosine_similarity(grads[0], grads[1], dim=0).item(), strides == {1}


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_bfloat16_is_an_autocast_around_float32_weights(pair: RankPool, stage: int) -> None:
    for types, cosine, interleaved in pair.run(2, formats, stage):
        assert types == {torch.float32}
        assert 0.98 < cosine < 1 - 1e-7
        assert interleaved  # as channels are everywhere in this project
