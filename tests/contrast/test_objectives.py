"""Objectives against the double loop, and what must hold for any of them."""

from __future__ import annotations

import pytest
import torch

from clae_dist.contrast.adversary import perturb
from clae_dist.contrast.objectives import OBJECTIVES
from tests import reference

N, D = 6, 5


def unit_rows(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    rows = torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1).to(dtype)


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_value_and_gradient_equal_the_double_loop(name: str, temperature: float) -> None:
    a, b = unit_rows(0).requires_grad_(), unit_rows(1).requires_grad_()
    fast, slow = OBJECTIVES[name](a, b, a, b, 0, temperature), reference.OBJECTIVES[name](a, b, temperature)
    assert abs(fast - slow) < 1e-12  # float64: only the order of summation differs
    for got, wanted in zip(torch.autograd.grad(fast, (a, b)), torch.autograd.grad(slow, (a, b)), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_mean_over_ranks_is_the_whole(name: str) -> None:
    """Positives of a later rank at the wrong offset would leave the loss near log N."""
    a, b = unit_rows(0), unit_rows(1)
    parts = [OBJECTIVES[name](a[r : r + 2], b[r : r + 2], a, b, r, 0.2) for r in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), reference.OBJECTIVES[name](a, b, 0.2), atol=1e-12, rtol=0)


def test_nt_xent_does_not_know_which_view_came_first() -> None:
    a, b = unit_rows(0), unit_rows(1)
    nt_xent = OBJECTIVES["nt_xent"]
    torch.testing.assert_close(nt_xent(a, b, a, b, 0, 0.2), nt_xent(b, a, b, a, 0, 0.2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_order_of_images_does_not_matter(name: str) -> None:
    a, b = unit_rows(0), unit_rows(1)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    objective = OBJECTIVES[name]
    torch.testing.assert_close(
        objective(a, b, a, b, 0, 0.2), objective(a[order], b[order], a[order], b[order], 0, 0.2), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_small_temperatures_and_bfloat16_stay_finite(name: str) -> None:
    a, b = unit_rows(0, torch.bfloat16), unit_rows(1, torch.bfloat16)
    loss = OBJECTIVES[name](a, b, a, b, 0, 0.01)
    assert loss.isfinite()
    assert loss.dtype == torch.float32


def test_perturb_stays_within_epsilon_and_the_valid_range_and_touches_nothing() -> None:
    x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = perturb(x, lambda image: (image * weight).sum(), 0.1)
    assert (found.images - x).abs().max() <= 0.1 + 1e-7  # one rounding of x + ε
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert weight.grad is None
    assert not found.images.requires_grad
    torch.testing.assert_close(found.images, (x + 0.1 * weight.detach().sign()).clamp(0, 1))


def test_perturb_by_nothing_returns_the_images() -> None:
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(perturb(x, lambda image: image.square().sum(), 0.0).images, x)


def test_perturb_with_an_epsilon_a_channel() -> None:
    x = torch.full((1, 3, 2, 2), 0.5)
    epsilon = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    torch.testing.assert_close(perturb(x, torch.sum, epsilon, valid=None).images, x + epsilon)
