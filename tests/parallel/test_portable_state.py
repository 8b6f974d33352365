"""A run saved under one backend and number of ranks goes on under another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clae_dist.config import Optim, Parallel, Train
from clae_dist.world import World
from tests.parallel.expected_steps import check_steps, expected_steps, largest_difference
from tests.parallel.step_kinds import Seen, Setup, take_step
from tests.ranks import RankPool

TOLERANCE = 1e-10  # float64: only the order of summation differs
KINDS = ["exact", "plain", "fused", "exact"]
HALF = 2

DDP, FSDP2 = Parallel(backend="ddp"), Parallel(backend="fsdp2")
HYBRID = Parallel(backend="fsdp2", shard_size=2)
ADAMW = Optim(name="adamw", learning_rate=0.01, weight_decay=0.1, scaling="none", warmup_epochs=0)
SGD = Optim(name="sgd", learning_rate=0.1, weight_decay=0.1, scaling="none", warmup_epochs=0)


def go_on(world: World, setup: Setup, kinds: list[str], start: int, state: Any) -> tuple[list[Seen], Any]:
    """Steps from number `start`, and the state after them."""
    backend = setup.backend(world)
    if state is not None:
        backend.load_state(state)
    return [take_step(backend, kind, start + number) for number, kind in enumerate(kinds)], backend.state()


@pytest.mark.parametrize(
    ("first", "second", "optim", "norm"),
    [
        ((FSDP2, 4), (DDP, 2), ADAMW, "batch"),
        pytest.param((DDP, 4), (FSDP2, 2), ADAMW, "batch", marks=pytest.mark.slow),
        pytest.param((HYBRID, 4), (FSDP2, 3), ADAMW, "group", marks=pytest.mark.slow),
        ((FSDP2, 3), (DDP, 1), SGD, "group"),
        pytest.param((FSDP2, 1), (HYBRID, 4), SGD, "batch", marks=pytest.mark.slow),
    ],
    ids=["fsdp2 to ddp", "ddp to fsdp2", "hybrid to fsdp2", "fsdp2 to one", "one to hybrid"],
)
def test_a_run_moves(
    ranks: RankPool, first: tuple[Parallel, int], second: tuple[Parallel, int], optim: Optim, norm: str
) -> None:
    train = Train(precision="float64", ema_decay=0.9)
    before, after = (Setup(norm=norm, optim=optim, train=train, parallel=parallel) for parallel, _ in (first, second))
    saved = ranks.run(first[1], go_on, before, KINDS[:HALF], 0, None)
    states = [state for _, state in saved]
    for state in states:  # every rank has all of it, the same
        assert largest_difference(state["model"], states[0]["model"]) == 0
        assert {type(value) for value in state["model"].values()} == {torch.Tensor}
    found = ranks.run(second[1], go_on, after, KINDS[HALF:], HALF, states[0])
    wanted, model = expected_steps(before, KINDS, first[1])
    check_steps([steps for steps, _ in found], wanted[HALF:], TOLERANCE)
    _, uninterrupted = ranks.run(1, go_on, Setup(norm=norm, optim=optim, train=train, parallel=DDP), KINDS, 0, None)[0]
    for _, state in found:
        assert largest_difference(state["model"], model) < TOLERANCE
        assert largest_difference(state["average"], uninterrupted["average"]) < TOLERANCE
        assert list(state["optimizer"]) == list(uninterrupted["optimizer"])
        for name, entries in uninterrupted["optimizer"].items():
            assert largest_difference(state["optimizer"][name], entries) < TOLERANCE
