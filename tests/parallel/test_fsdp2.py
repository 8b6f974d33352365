"""The FSDP2 backend trains as one process does, reduces gradients once a step, and holds parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from clae_dist.config import Attack, Optim, Parallel, Train
from clae_dist.errors import ConfigError
from clae_dist.parallel.fsdp2 import Fsdp2Backend
from clae_dist.world import World
from tests.parallel.expected_steps import check_steps, expected_steps, largest_difference
from tests.parallel.step_kinds import KINDS, STEPS, Seen, Setup, compare, take_step, views
from tests.ranks import RankPool

TOLERANCE = 1e-10  # float64: only the order of summation differs
FLOAT64 = Train(precision="float64")
SLOW = pytest.mark.slow


def run_steps(world: World, setup: Setup, kinds: list[str]) -> tuple[list[Seen], dict[str, Any]]:
    """The steps, and the state after them."""
    backend = setup.backend(world)
    return [take_step(backend, kind, number) for number, kind in enumerate(kinds)], backend.state()


def check(ranks: RankPool, world_size: int, setup: Setup, kinds: list[str]) -> None:
    """The attack's images, gradients, their norm, and parameters and statistics after all steps: as one process would."""
    found = ranks.run(world_size, run_steps, setup, kinds)
    wanted, state = expected_steps(setup, kinds, world_size)
    check_steps([steps for steps, _ in found], wanted, TOLERANCE)
    for _, after in found:
        assert largest_difference(after["model"], state) < TOLERANCE


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW), pytest.param(4, marks=SLOW)]
)
@pytest.mark.parametrize("norm", [pytest.param("group", marks=SLOW), "batch"])
def test_ranks_train_as_one_process(ranks: RankPool, world_size: int, norm: str) -> None:
    """All kinds of steps one after another: what one leaves behind would show in the next."""
    kinds = [*KINDS, "plain", "exact", *(["shared"] if norm == "group" else [])]
    check(ranks, world_size, Setup(norm=norm), kinds)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (4, Parallel(backend="fsdp2", shard_size=2)),
        pytest.param(4, Parallel(backend="fsdp2", shard_size=1), marks=SLOW),
        pytest.param(4, Parallel(backend="fsdp2", shard_size=2, reshard_after_forward=False), marks=SLOW),
        pytest.param(3, Parallel(backend="fsdp2", reshard_after_forward=False), marks=SLOW),
    ],
    ids=["hybrid", "copies only", "hybrid, kept whole", "kept whole"],
)
def test_other_ways_of_sharding_train_the_same(ranks: RankPool, world_size: int, parallel: Parallel) -> None:
    check(ranks, world_size, Setup(parallel=parallel), ["exact", "chunked", "plain", "fused"])


@pytest.mark.parametrize(
    "optim",
    [
        Optim(name="sgd", learning_rate=0.1, scaling="none", warmup_epochs=0, weight_decay=0.1, decay="all", clip_norm=0.05),
        Optim(name="lars", learning_rate=5.0, scaling="none", warmup_epochs=0, weight_decay=0.1),
        Optim(name="adamw", learning_rate=0.01, scaling="none", warmup_epochs=0, clip_norm=0.05),
    ],
    ids=lambda optim: optim.name,
)
def test_optimisers_see_whole_layers(ranks: RankPool, optim: Optim) -> None:
    """LARS takes the norm of a layer, clipping that of all of them, not of a rank's part; a left-out route keeps moving."""
    check(ranks, 3, Setup(optim=optim), ["exact", "plain", "fused"])


@pytest.mark.parametrize(
    ("train", "attack"),
    [(replace(FLOAT64, activation_checkpointing=True), Attack()), (FLOAT64, Attack(freeze="always"))],
    ids=["recomputed blocks", "frozen attack"],
)
def test_options_train_the_same(ranks: RankPool, train: Train, attack: Attack) -> None:
    """The very first forward is an attack's: what it asked of parameters must not stay."""
    check(ranks, 2, Setup(train=train, attack=attack), ["exact", "chunked_clean", "plain", "fused"])


class NormsApart(Fsdp2Backend):
    """As under bfloat16, at a precision that can be compared."""

    def _norms_apart(self) -> bool:
        return True


def run_norms_apart(world: World, setup: Setup, kinds: list[str]) -> list[Seen]:
    backend = NormsApart(setup.config(), setup.model(world.group), world)
    return [take_step(backend, kind, number) for number, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    ("reshard", "checkpointing"),
    [
        pytest.param(True, False, marks=SLOW),
        (True, True),
        pytest.param(False, False, marks=SLOW),
        pytest.param(False, True, marks=SLOW),
    ],
    ids=["", "recomputed blocks", "kept whole", "kept whole, recomputed blocks"],
)
def test_batch_norms_apart_train_the_same(ranks: RankPool, checkpointing: bool, reshard: bool) -> None:
    setup = Setup(
        train=replace(FLOAT64, activation_checkpointing=checkpointing),
        parallel=Parallel(backend="fsdp2", reshard_after_forward=reshard),
    )
    found = ranks.run(2, run_norms_apart, setup, list(KINDS))
    check_steps(found, expected_steps(setup, list(KINDS), 2)[0], TOLERANCE)


@SLOW
def test_compiled_blocks_train_the_same(ranks: RankPool) -> None:
    check(ranks, 2, Setup(norm="group", train=replace(FLOAT64, compile=True)), ["exact", "plain", "fused"])


# ---- communication ----


def count_reductions(
    world: World, kinds: list[str], parallel: Parallel, left_alone: bool = False
) -> tuple[dict[str, int], int]:
    """Collectives that carry gradients, by the kind of step; and the number of units with parameters."""
    backend = Setup(norm="group", parallel=parallel).backend(world)
    assert isinstance(backend, Fsdp2Backend)
    if left_alone:  # reduction is on in every backward that does not hold it
        backend._backward = lambda loss: (backend._set_reduction(not backend._held), loss.backward())  # type: ignore[assignment]
    counts = {}
    for number, kind in enumerate(kinds):
        with CommDebugMode() as debug:
            step_without_update(backend, kind, number)
        counts[kind] = sum(count for name, count in debug.get_comm_counts().items() if "reduce" in str(name))
    return counts, len(backend.model.encoder.layers) + 2  # type: ignore[arg-type]


def step_without_update(backend: Fsdp2Backend, kind: str, number: int) -> None:
    """The step without its update, whose norm of the gradient is reduced, too."""
    STEPS[kind](backend, *views(backend.world, number, torch.float64))
    backend.optimizer.zero_grad()


def test_gradients_are_reduced_once_a_step(ranks: RankPool) -> None:
    for counts, num_units in ranks.run(2, count_reductions, [*KINDS, "shared"], Parallel(backend="fsdp2")):
        assert set(counts.values()) == {num_units}, counts


def test_left_alone_what_was_held_is_reduced_apart(ranks: RankPool) -> None:
    """The fused step reduces twice where reduction is switched on for the whole of its last backward."""
    for counts, num_units in ranks.run(2, count_reductions, ["fused"], Parallel(backend="fsdp2"), True):
        assert counts["fused"] > num_units, counts


def test_hybrid_reduces_once_in_a_copy_and_once_between_copies(ranks: RankPool) -> None:
    for counts, num_units in ranks.run(4, count_reductions, ["exact", "chunked"], Parallel(backend="fsdp2", shard_size=2)):
        assert set(counts.values()) == {2 * num_units}, counts


def parts(world: World, parallel: Parallel) -> tuple[list[str], float]:
    """Parameters that this rank holds whole, and its share of all numbers."""
    backend = Setup(parallel=parallel).backend(world)
    whole = [name for name, p in backend.model.named_parameters() if not isinstance(p, DTensor)]
    total = sum(p.numel() for p in backend.model.parameters())
    return whole, sum(shard.numel() for shard in backend._shards()) / total


@pytest.mark.parametrize(("shard_size", "share"), [(0, 1 / 4), (2, 1 / 2)])
def test_a_rank_holds_its_part(ranks: RankPool, shard_size: int, share: float) -> None:
    found = ranks.run(4, parts, Parallel(backend="fsdp2", shard_size=shard_size))
    assert all(whole == [] for whole, _ in found)
    assert sum(part for _, part in found) == pytest.approx(4 * share)
    assert max(part for _, part in found) < share + 0.15  # rows of a layer, so that parts differ in size


def test_a_shard_size_that_does_not_divide_is_refused() -> None:
    world = replace(World.single("cpu"), size=6)
    with pytest.raises(ConfigError, match=r"^parallel.shard_size is 4, which does not divide the 6 ranks; try 3, or 0"):
        Setup(parallel=Parallel(backend="fsdp2", shard_size=4)).backend(world)


# ---- traps ----


def attack_by_backward(world: World) -> tuple[float, float]:
    """How far the gradient of a plain step is off, after an attack by autograd.grad, and by .backward() and zero_grad."""
    errors = []
    for through in ("grad", "backward"):
        backend = Setup(norm="group").backend(world)
        assert isinstance(backend, Fsdp2Backend)
        x, _ = views(world, 9, torch.float64)
        x_try = x.clone().requires_grad_()
        loss = compare(torch.ones(len(x), 5, dtype=torch.float64), backend.attack_embed(x_try, "clean"))
        if through == "grad":
            torch.autograd.grad(loss, x_try)
        else:
            loss.backward()
            backend.optimizer.zero_grad()
        (wanted,), _ = expected_steps(Setup(norm="group"), ["plain"], world.size)
        errors.append(largest_difference(take_step(backend, "plain", 0).gradients, wanted.gradients))
    return errors[0], errors[1]


def test_an_attack_leaves_no_gradient(ranks: RankPool) -> None:
    """Guards against .backward() for an attack without reduction: it leaks into the next step, zero_grad or not."""
    for ours, wrong in ranks.run(2, attack_by_backward):
        assert ours < TOLERANCE
        assert wrong > 1e-2
