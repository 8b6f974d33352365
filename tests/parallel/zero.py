"""What the tests of the DeepSpeed backend have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from clae_dist.bench.measure import replaced
from clae_dist.config import Optim, Parallel, Train
from clae_dist.parallel import Backend, deepspeed
from clae_dist.world import World
from tests.parallel.step_kinds import Setup, take_step

STAGES = [0, 1, 2, 3]
# For parametrize: 1 and 3 are the most used and the most different; the others in CI.
EVERY_STAGE = [stage if stage == 3 else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES]
TOLERANCE = 1e-5  # of the largest element: float32 against float64
SGD = Optim(name="sgd", learning_rate=0.05, momentum=0.9, weight_decay=0.1, scaling="none", warmup_epochs=0)
ADAMW = Optim(name="adamw", learning_rate=0.01, weight_decay=0.1, scaling="none", warmup_epochs=0)
FLOAT32 = Train(precision="float32")


def setup_of(stage: int, norm: str = "batch", optim: Optim = SGD, **changes: Any) -> Setup:
    """ZeRO at that stage; -1 is DDP."""
    parallel = Parallel(backend="ddp") if stage < 0 else Parallel(backend="deepspeed", zero_stage=stage)
    return replace(Setup(norm=norm, optim=optim, train=FLOAT32, parallel=parallel), **changes)


def backend_of(world: World, setup: Setup, persistent: int = 0) -> Backend:
    """At stage 3 no parameter of more than `persistent` elements stays whole; DeepSpeed would leave all of these small ones."""
    with replaced(deepspeed, _PERSISTENT=persistent):
        return setup.backend(world)


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference of any tensor, relative to its largest element (or to a hundredth of the largest of all)."""
    assert found.keys() == wanted.keys()
    least = 0.01 * max(value.abs().max().item() for value in wanted.values())
    return max(
        ((found[name].double() - value.double()).abs().max() / max(value.abs().max().item(), least)).item()
        for name, value in wanted.items()
    )


def go_on(world: World, setup: Setup, state: dict[str, Any] | None, first: int, kinds: list[str]) -> dict[str, Any]:
    """Those steps from that state, and the state then."""
    backend = backend_of(world, setup)
    if state is not None:
        backend.load_state(state)
    for number, kind in enumerate(kinds):
        take_step(backend, kind, first + number)
    return backend.state()
