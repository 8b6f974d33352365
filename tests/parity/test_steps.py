"""`clae parity` compares each step from the same state: what rounding flips in one step is not carried into the next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from clae_dist.contrast.adversary import Ball
from clae_dist.methods.clae import Clae
from clae_dist.parity import observe as observing
from clae_dist.parity.compare import compare_steps, difference, table
from clae_dist.parity.observe import Observation, Start, Tensors, observe, reference
from clae_dist.parity.run import alone
from clae_dist.world import World
from tests.parity.test_parity_tool import CONFIG

STEPS = 3
FLOAT32 = replace(CONFIG, train=replace(CONFIG.train, precision="float32"))
HERE = World.single("cpu")
NOISE = 1e-2  # a share of the largest gradient; rounding's own, 1e-5, meets no pixel of so few


@pytest.fixture(autouse=True)
def _more_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(observing.SIGN_NOISE, "float32", NOISE)


def runs(starts_from_reference: bool) -> tuple[list[Observation], list[Observation], list[Start]]:
    one, starts = reference(alone(FLOAT32), HERE, STEPS, "float32")
    return observe(FLOAT32, HERE, STEPS, starts if starts_from_reference else None), one, starts


def with_flipped_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another order of summation does it: training's δ is turned round in the pixels with the smallest gradients."""
    right = Ball.step

    def flipping(ball: Ball, x: torch.Tensor, at: torch.Tensor, gradient: torch.Tensor, length: Any) -> torch.Tensor:
        flipped = torch.where(gradient.abs() < 0.5 * NOISE * gradient.abs().max(), -gradient, gradient)
        return right(ball, x, at, flipped, length)

    monkeypatch.setattr(Ball, "step", flipping)


def test_signs_that_rounding_flips_pass_where_every_step_starts_at_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    one, starts = reference(alone(FLOAT32), HERE, STEPS, "float32")
    single = observe(alone(FLOAT32), HERE, STEPS, starts)
    with_flipped_pixels(monkeypatch)
    many, freely = observe(FLOAT32, HERE, STEPS, starts), observe(FLOAT32, HERE, STEPS)
    assert any(not torch.equal(a.signs, b.signs) for a, b in zip(many, one, strict=True)), "nothing was flipped"
    free = difference(freely[-1].params_after, one[-1].params_after, "float32")
    found = compare_steps(FLOAT32, 1, "float32", many, single, one, free)
    assert found.passed, found
    assert (found.steps, found.failed_step) == (STEPS, 0)
    assert free.relative > 10 * found.params_after.relative  # which the old comparison judged
    assert any("not judged" in line for line in table(found))


def test_a_step_that_goes_wrong_is_named_and_the_others_are_not() -> None:
    many, one, _ = runs(starts_from_reference=True)
    wrong: Tensors = {name: 2 * value for name, value in many[1].grads.items()}
    found = compare_steps(FLOAT32, 2, "float32", [many[0], replace(many[1], grads=wrong), many[2]], many, one)
    assert (found.passed, found.failed_step) == (False, 2)
    assert "2 times the length" in found.cause
    assert any("FAILED at step 2" in line for line in table(found))


def test_every_step_begins_at_the_reference() -> None:
    many, one, starts = runs(starts_from_reference=True)
    assert starts[0].state == {}
    for before, start in zip(one, starts[1:], strict=False):
        for name, value in before.params_after.items():
            assert torch.equal(start.state["model"][name], value.float())
    assert max(difference(a.params_after, b.params_after).relative for a, b in zip(many, one, strict=True)) < 1e-4


def test_a_wrong_attack_is_not_hidden() -> None:
    """Only pixels whose sign rounding decides are taken from the reference."""
    (one,), (start,) = reference(alone(FLOAT32), HERE, 1, "float32")
    assert 0 < start.undecided.double().mean() < 0.1
    wrong = replace(FLOAT32, method=Clae.Settings(anchor="other"))
    many, single = observe(wrong, HERE, 1, [start]), observe(alone(FLOAT32), HERE, 1, [start])
    found = compare_steps(FLOAT32, 1, "float32", many, single, [one])
    assert found.delta_sign_agreement < 1
    assert found.param_grad.first
