"""RoCL: its loss on three views and its attack, against the formulas of its paper and code."""

from __future__ import annotations

import torch

from clae_dist.methods.rocl import RoclSettings
from tests.methods.attacked import PGD, TEMPERATURE, Tried, noise, nt_xent


def three_views(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The sum over the six ordered pairs, divided by 3N; columns are constants."""
    z = torch.cat([a, b, c])
    s = (z @ z.detach().T / TEMPERATURE).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    count, total = len(a), torch.zeros((), dtype=torch.float64)
    for anchor in range(len(z)):
        for view in range(3):
            if view != anchor // count:
                total = total + s[anchor].logsumexp(0) - s[anchor, view * count + anchor % count]
    return total / len(z)


def test_loss_and_gradient_are_those_of_the_code() -> None:
    tried = Tried(RoclSettings(regulariser=0.25), norm="group")
    (x_adv,) = tried.attacked
    rows = [tried.model(images).detach().requires_grad_() for images in (tried.x, tried.y, x_adv)]
    a, b, c = rows
    wanted = three_views(a, b, c) + 0.25 * nt_xent(c, b, constant=True)
    total = tried.step.total(tried.terms)
    torch.testing.assert_close(total, wanted, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(wanted, rows)
    total.backward()
    for embedding, gradient in zip(tried.step.embeddings, gradients, strict=True):
        torch.testing.assert_close(embedding.z.grad, gradient, rtol=0, atol=1e-12)


def test_the_attack_moves_away_from_the_other_view_in_evaluation_mode() -> None:
    tried = Tried(RoclSettings())
    model = tried.as_before()
    at = (tried.x + PGD.epsilon * (2 * noise(0) - 1)).clamp(0, 1)
    other = model(tried.y).detach()
    for _ in range(PGD.steps):
        at = at.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(nt_xent(model(at), other, constant=True), at)
        delta = (at - tried.x + PGD.step_size * gradient.sign()).clamp(-PGD.epsilon, PGD.epsilon)
        at = (tried.x + delta).clamp(0, 1)
    torch.testing.assert_close(tried.attacked[0], at.detach(), rtol=0, atol=1e-12)


def test_everything_takes_the_clean_route_and_the_regulariser_can_go() -> None:
    tried = Tried(RoclSettings(regulariser=0.0))
    assert {embedding.route for embedding in tried.step.embeddings} == {"clean"}
    assert list(tried.terms) == ["three_views"]
    assert not RoclSettings().two_routes
