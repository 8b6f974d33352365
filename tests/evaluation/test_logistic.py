from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from clae_dist.evaluation import logistic
from clae_dist.evaluation.logistic import principal_axes, solve


def _set(count: int = 300, width: int = 8, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated, centred features of different size, and labels that they tell in part."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    x = torch.randn(count, width, generator=generator) + 0.7 * torch.randn(classes, width, generator=generator)[y]
    x = x @ torch.randn(width, width, generator=generator) * torch.logspace(-1, 1, width)
    return x - x.mean(0), y


def _loss(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, penalty: float) -> torch.Tensor:
    logits = x.double() @ weight + bias
    return torch.nn.functional.cross_entropy(logits, y) + penalty / 2 * weight.square().sum()


def _blank(width: int = 8, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(width, classes), torch.zeros(classes)


@pytest.mark.parametrize("block", [2048, 7])
def test_the_gradient_is_autograds(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "_ROWS", block)
    x, y = _set()
    x = x.double()
    problem = logistic._Problem(x, y, principal_axes(x), 4, 0.03)
    point = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    expected = _loss(x, y, *problem.weights(point), penalty=0.03)
    (gradient,) = torch.autograd.grad(expected, point)
    loss, found = problem.loss_and_gradient(point.detach())
    assert loss == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


def test_parameters_and_weights_are_inverse() -> None:
    x, y = _set()
    problem = logistic._Problem(x.double(), y, principal_axes(x.double()), 4, 0.03)
    weight, bias = torch.randn(8, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    again = problem.weights(problem.parameters(weight, bias))
    torch.testing.assert_close(again[0], weight)
    torch.testing.assert_close(again[1], bias)


@pytest.mark.parametrize("penalty", [1.0, 1e-2, pytest.param(1e-4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tolerance", [1e-4, pytest.param(1e-6, marks=pytest.mark.slow)])
def test_the_loss_is_within_the_tolerance_of_scikit_learns(penalty: float, tolerance: float) -> None:
    """The tolerance is of a quadratic, so that the distance may be a few times as large."""
    x, y = _set()
    theirs = LogisticRegression(C=1 / (penalty * len(y)), tol=1e-10, max_iter=10_000).fit(x.double().numpy(), y.numpy())
    least = _loss(x, y, torch.from_numpy(theirs.coef_.T), torch.from_numpy(theirs.intercept_), penalty)
    ours = solve(x, y, principal_axes(x), _blank(), penalty, 200, tolerance)
    assert float(_loss(x, y, ours.weight.double(), ours.bias.double(), penalty) - least) < 10 * tolerance + 1e-7


def test_a_start_at_the_minimum_takes_one_pass() -> None:
    x, y = _set()
    axes = principal_axes(x)
    best = solve(x, y, axes, _blank(), 1e-2, 200, 1e-8)
    again = solve(x, y, axes, (best.weight, best.bias), 1e-2, 200, 1e-6)
    assert again.passes == 1
    assert solve(x, y, axes, _blank(), 1e-2, 3, 1e-9).passes <= 1 + 3 + 2  # iterations bound the passes, but for retries


def test_directions_without_variance_have_no_weight() -> None:
    """Their scale would be 1/√penalty, and the first step would leave the range of float32."""
    x, y = _set()
    copied = torch.cat([x, x[:, :3], torch.zeros(len(x), 2)], 1)
    axes = principal_axes(copied)
    assert len(axes.variance_K) == 8
    found = solve(copied, y, axes, _blank(13), 1e-3, 100, 1e-7)
    assert found.weight[11:].abs().max() == 0
    # The minimum divides a weight evenly among copies.
    torch.testing.assert_close(found.weight[:3], found.weight[8:11], rtol=1e-3, atol=1e-4)


def test_separable_classes_end_at_the_penalty() -> None:
    x = torch.tensor([[-1.0], [1.0]]).repeat(20, 1)
    y = torch.tensor([0, 1]).repeat(20)
    found = solve(x, y, principal_axes(x), _blank(1, 2), 1e-4, 200, 1e-9)
    assert np.isfinite(found.weight.numpy()).all()
    theirs = LogisticRegression(C=1 / (1e-4 * 40), tol=1e-10, max_iter=1000).fit(x.numpy(), y.numpy())
    # Two weights of opposite sign here, one there, with half of the penalty each.
    direct = _loss(x, y, found.weight.double(), found.bias.double(), 1e-4)
    half = torch.tensor([[-theirs.coef_[0, 0] / 2, theirs.coef_[0, 0] / 2]], dtype=torch.float64)
    assert float(direct) <= float(_loss(x, y, half, torch.zeros(2), 1e-4)) + 1e-7
