"""The DeepSpeed backend at ZeRO stages 0 to 3 against one process, and what the engine would do wrong if it were asked."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clae_dist.config import Attack, Optim, Train
from clae_dist.errors import ConfigError
from clae_dist.world import World
from tests.parallel.expected_steps import expected_steps
from tests.parallel.step_kinds import KINDS, STEPS, Seen, Setup, compare, take_step, views
from tests.parallel.zero import EVERY_STAGE, FLOAT32, SGD, STAGES, TOLERANCE, apart, backend_of, setup_of
from tests.ranks import RankPool

# ---- as one process ----


def run_steps(world: World, setup: Setup, kinds: list[str], persistent: int = 0) -> tuple[list[Seen], dict[str, Any]]:
    backend = backend_of(world, setup, persistent)
    return [take_step(backend, kind, number) for number, kind in enumerate(kinds)], backend.state()


def check(pair: RankPool, setup: Setup, kinds: list[str], persistent: int = 0) -> None:
    """Images of the attack, gradients, their norm, and parameters and statistics after all steps: as one process would."""
    found = pair.run(2, run_steps, setup, kinds, persistent)
    wanted, state = expected_steps(setup, kinds, 2)
    for number, step in enumerate(wanted):
        x_adv = torch.cat([steps[number].x_adv for steps, _ in found])
        assert (x_adv - step.x_adv).abs().max() < 1e-6, kinds[number]
        for steps, _ in found:
            assert apart(steps[number].gradients, step.gradients) < TOLERANCE, kinds[number]
            assert type(steps[number].norm) is torch.Tensor
            assert abs(steps[number].norm / step.norm - 1) < TOLERANCE
    for _, after in found:
        assert apart(after["model"], state) < TOLERANCE


@pytest.mark.parametrize("norm", [pytest.param("group", marks=pytest.mark.slow), "batch"])
@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_ranks_train_as_one_process(pair: RankPool, stage: int, norm: str) -> None:
    """All kinds of steps one after another: what one leaves behind would show in the next.

    "plain" leaves out the adversarial route, whose parameters decay and keep their momentum, as under DDP.
    """
    shared = ["shared"] if norm == "group" and stage < 3 else []
    check(pair, setup_of(stage, norm), [*KINDS, "plain", "exact", *shared])


def test_parameters_that_stay_whole_at_stage_3_train_as_one_process(pair: RankPool) -> None:
    check(pair, setup_of(3), ["exact", "fused", "plain", "exact"], persistent=1000)


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_gradients_are_clipped_to_what_the_config_says_and_the_norm_before_is_returned(pair: RankPool, stage: int) -> None:
    """DeepSpeed's own default has become 1.0."""
    check(pair, setup_of(stage, optim=replace(SGD, clip_norm=0.3)), ["exact", "fused", "plain"])


@pytest.mark.parametrize("stage", EVERY_STAGE)
@pytest.mark.parametrize("option", ["checkpointing", pytest.param("frozen", marks=pytest.mark.slow)])
def test_options_train_as_one_process(pair: RankPool, stage: int, option: str) -> None:
    changes: dict[str, Any] = {"train": replace(FLOAT32, activation_checkpointing=True)}
    if option == "frozen":
        changes = {"attack": Attack(freeze="always")}
    check(pair, setup_of(stage, **changes), ["exact", "fused", "chunked", "plain", "exact"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled_blocks_train_as_one_process(pair: RankPool, stage: int) -> None:
    check(pair, setup_of(stage, "group", train=replace(FLOAT32, compile=True)), ["exact", "plain", "exact"])


def test_shared_forwards_are_not_offered_at_stage_3(pair: RankPool) -> None:
    """A module that runs backward twice for one forward there finds its weights gone."""
    assert pair.run(2, shares_forward) == [[True, True, True, False]] * 2


def shares_forward(world: World) -> list[bool]:
    return [backend_of(world, setup_of(stage)).shares_forward() for stage in STAGES]


# ---- the traps ----


def attack_through(world: World, stage: int, through: str) -> tuple[str, float]:
    """Three steps, all through the engine or beside it: what was raised, and how far the weights are from DDP's."""
    states = []
    for setup in (setup_of(-1, "group"), setup_of(stage, "group")):
        backend: Any = backend_of(world, setup)
        by_engine = setup.parallel.backend == "deepspeed" and through == "engine"
        attack_embed, embed = [backend.engine] * 2 if by_engine else [backend.attack_embed, backend.embed]
        for number in range(3):
            x, y = views(world, number, torch.float32)
            x_try = x.clone().requires_grad_()
            try:
                z = attack_embed(x_try, "clean")
                (gradient,) = torch.autograd.grad(compare(z.detach(), z), x_try)
                a, b, c = embed(torch.cat([x, y, x + 0.03 * gradient.sign()]), "clean").chunk(3)
                backend.backward(compare(a, b) + compare(a, c))
            except Exception as error:
                return str(error), 0.0
            backend.engine.step() if by_engine else backend.update()
        states.append(backend.state()["model"])
    return "", apart(states[1], states[0])


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_an_attack_beside_the_engine_leaves_training_alone(pair: RankPool, stage: int) -> None:
    for raised, difference in pair.run(2, attack_through, stage, "module"):
        assert raised == ""
        assert difference < TOLERANCE


@pytest.mark.slow
def test_an_attack_through_the_engine_does_not() -> None:
    """Stages 0 to 2 raise, stage 3 trains on. Should this fail one day, DeepSpeed has become kinder.

    A pool of its own: what raised has left an engine in the middle of something.
    """
    pool = RankPool(2)
    try:
        for stage in reversed(STAGES):
            for raised, difference in pool.run(2, attack_through, stage, "engine"):
                assert raised if stage < 3 else difference > 1e-2
    finally:
        pool.close()


class Collectives(TorchDispatchMode):
    """Counts the elements that reductions send."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d.") and "reduce" in name:
            tensors = args[1] if "scatter" in name else args[0]
            self.elements.append(sum(t.numel() for t in (tensors if isinstance(tensors, list) else [tensors])))
        return func(*args, **(kwargs or {}))


def reduced(world: World, stage: int, kinds: list[str]) -> tuple[int, list[list[int]]]:
    """How many elements the parameters have, and the sizes of what each kind of step reduces before its update."""
    backend = backend_of(world, setup_of(stage, "group"))
    counts = []
    for number, kind in enumerate(kinds):
        with Collectives() as seen:
            STEPS[kind](backend, *views(world, number, torch.float32))
        backend.update()
        counts.append(seen.elements)
    return sum(getattr(p, "ds_numel", p.numel()) for p in backend.model.parameters()), counts


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_gradients_are_reduced_once_a_step(pair: RankPool, stage: int) -> None:
    """Whatever the number of backward passes: fused has two, chunked six and more."""
    for size, counts in pair.run(2, reduced, stage, list(KINDS)):
        for kind, seen in zip(KINDS, counts, strict=True):
            assert len(seen) == 1, f"{kind}: {seen}"
            assert size <= seen[0] <= 1.2 * size, f"{kind}: {seen} of {size}"  # padding


def without_clearing(world: World) -> float:
    """Stage 3 with one line taken out: how far the gradients of a left-out route are from zero."""
    backend: Any = backend_of(world, setup_of(3))
    take_step(backend, "exact", 0)
    take_step(backend, "exact", 1)
    kept = backend.engine.optimizer.grad_partitions_flat_buffer
    backend.engine.optimizer.grad_partitions_flat_buffer = torch.zeros(1)
    take_step(backend, "exact", 2)
    backend.engine.optimizer.grad_partitions_flat_buffer = kept
    seen = take_step(backend, "plain", 3)
    return max(g.abs().max().item() for name, g in seen.gradients.items() if "adversarial" in name)


def test_stage_3_would_step_with_the_last_gradient_of_a_left_out_route(pair: RankPool) -> None:
    assert min(pair.run(2, without_clearing)) > 1e-3


def infinite(world: World, stage: int) -> tuple[float, bool]:
    """The norm of a step whose gradient overflows, and whether the weights stayed as they were."""
    backend = backend_of(world, setup_of(stage))
    before = backend.state()["model"]
    x, y = views(world, 0, torch.float32)
    backend.backward(compare(backend.embed(x, "clean"), backend.embed(y, "clean")) * 1e38 * 1e38)
    update = backend.update()
    assert not update.taken
    return update.norm.item(), all(
        torch.equal(value, before[name]) for name, value in backend.state()["model"].items() if "route" in name
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_not_finite_has_no_finite_norm(pair: RankPool, stage: int) -> None:
    assert pair.run(2, infinite, stage) == [(float("inf"), True)] * 2


# ---- what is refused ----


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (setup_of(1, train=Train(precision="float64")), "train.precision is 'float64'.*use float32"),
        (setup_of(1, optim=Optim(name="lars")), "optim.name is 'lars'.*parallel.zero_stage 1.*use optim.name=sgd"),
        (setup_of(3, train=replace(FLOAT32, compile=True)), "train.compile is true.*parallel.zero_stage 3.*zero_stage=2"),
    ],
    ids=["float64", "lars", "compile"],
)
def test_what_zero_cannot_honour_is_refused(pair: RankPool, setup: Setup, message: str) -> None:
    for refusal in pair.run(2, refused, setup):
        assert re.match(message, refusal), refusal


def refused(world: World, setup: Setup) -> str:
    with pytest.raises(ConfigError) as error:
        backend_of(world, setup)
    return str(error.value)


def test_lars_works_where_nothing_is_shared(pair: RankPool) -> None:
    lars = Optim(name="lars", learning_rate=0.5, weight_decay=0.01, scaling="none", warmup_epochs=0)
    check(pair, setup_of(0, optim=lars), ["exact", "plain", "fused"])


def test_one_process_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="parallel.backend is 'deepspeed', but this run has a single rank.*parallel.backend=ddp"
    ):
        setup_of(2).backend(World.single("cpu"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'deepspeed', which is not installed; pip install 'deepspeed>="):
        setup_of(2).backend(World.single("cpu"))
