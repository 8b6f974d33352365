"""ACL-AIR: its regularisers as the paper and as its code have them, and ACL as its limit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clae_dist.contrast.interface import Moment
from clae_dist.methods.acl import AclSettings
from clae_dist.methods.air import AirSettings
from tests.methods.attacked import PGD, TEMPERATURE, Tried


def softmax(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = ((u * v).sum(1) / TEMPERATURE).exp()
    return weights / weights.sum()


def test_without_regularisers_it_is_twice_acl() -> None:
    tried, acl = Tried(AirSettings(standard=0.0, adversarial=0.0)), Tried(AclSettings())
    assert {name: 0.5 * weight for name, (weight, _) in tried.terms.items()} == {
        name: weight for name, (weight, _) in acl.terms.items()
    }
    for name, (_, loss) in acl.terms.items():
        torch.testing.assert_close(tried.terms[name][1], loss, rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_the_regularisers_are_those_of_the_formulas(form: str) -> None:
    tried = Tried(AirSettings(form=form), norm="group")  # type: ignore[arg-type]
    model, (x_adv, y_adv) = tried.model, tried.attacked
    a, b, o, c, d = (model(images).detach() for images in (tried.x, tried.y, tried.third, x_adv, y_adv))
    u, v = softmax(a, o), softmax(b, o)
    q_x, q_y = softmax(c, a) * softmax(c, o), softmax(d, b) * softmax(d, o)
    if form == "paper":
        sir, air = (v * (v / u).log()).sum(), (q_y * (q_y / q_x).log()).sum()
    else:
        sir, air = (v * (v.log() - u)).sum(), (q_y * (q_y.log() - q_x)).sum()
    assert tried.terms["sir"][0] == tried.terms["air"][0] == 0.5
    torch.testing.assert_close(tried.terms["sir"][1], sir, rtol=0, atol=1e-12)
    torch.testing.assert_close(tried.terms["air"][1], air, rtol=0, atol=1e-12)


def test_equal_views_have_no_divergence() -> None:
    tried = Tried(AirSettings(), norm="group", same=True)
    torch.testing.assert_close(*tried.attacked)
    for name in ("sir", "air"):
        assert tried.terms[name][1].abs() < 1e-12


def test_the_shift_follows_the_augmentation() -> None:
    tried = Tried(AirSettings(shift=2 / 3), replace(PGD, steps=1))

    class Batch(tuple):  # type: ignore[type-arg]
        strength = 0.25

    step = type(tried.step)(tried.step.run, Batch((tried.x, tried.y)), Moment())
    step.more_views = [tried.third]
    terms = step.run.method.losses(step, tried.x, tried.y)
    assert (terms["clean"][0], terms["adversarial"][0]) == pytest.approx((0.5, 1.5))
    assert (tried.terms["clean"][0], tried.terms["adversarial"][0]) == (1, 1)
