"""The perturbation of images (adversary.py)."""

from __future__ import annotations

import math

import pytest
import torch

from clae_dist.contrast.adversary import Ball, perturb


def gradient(loss):  # type: ignore[no-untyped-def]
    def of(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = images.detach().requires_grad_()
        value = loss(images)
        return value, torch.autograd.grad(value, images)[0]

    return of


def test_perturb_stays_within_epsilon_and_the_valid_range_and_touches_nothing() -> None:
    x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = perturb(x, gradient(lambda image: (image * weight).sum()), Ball(0.1))
    assert (found.images - x).abs().max() <= 0.1 + 1e-7  # one rounding of x + ε
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert weight.grad is None
    assert not found.images.requires_grad
    torch.testing.assert_close(found.images, (x + 0.1 * weight.detach().sign()).clamp(0, 1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_perturb_by_nothing_returns_the_images(norm: str) -> None:
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(perturb(x, gradient(lambda image: image.square().sum()), Ball(0.0, norm)).images, x)  # type: ignore[arg-type]


def test_perturb_with_an_epsilon_a_channel() -> None:
    x = torch.full((1, 3, 2, 2), 0.5)
    epsilon = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    torch.testing.assert_close(perturb(x, gradient(torch.sum), Ball(epsilon, valid=None)).images, x + epsilon)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", [False, True])
def test_many_steps_stay_in_the_ball_and_get_further_than_one(norm: str, start: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    x, goal, noise = (torch.rand(4, 3, 6, 6, generator=draw, dtype=torch.float64) for _ in range(3))
    epsilon = 0.05 if norm == "linf" else 0.4

    def loss(images: torch.Tensor) -> torch.Tensor:
        return -((images - goal) ** 4).sum()

    found = perturb(
        x,
        gradient(loss),
        Ball(epsilon, norm),
        steps=20,
        step_length=epsilon / 5,
        noise=noise if start else None,  # type: ignore[arg-type]
    ).images
    delta = (found - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= epsilon * (1 + 1e-12)).all()
    assert (size > 0.9 * epsilon).all()
    assert loss(found) > loss(perturb(x, gradient(loss), Ball(epsilon / 4, norm)).images)  # type: ignore[arg-type]


def test_the_length_of_the_gradient_does_not_matter_in_l2() -> None:
    """It arrives multiplied by the number of ranks; and a gradient of zero must not become a NaN."""
    x = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[2] = 0
    one, many = (
        perturb(x, gradient(lambda image, times=times: times * (image * weight).sum()), Ball(0.3, "l2", None)).images
        for times in (1.0, 1e6)
    )
    torch.testing.assert_close(one, many, atol=1e-12, rtol=0)
    torch.testing.assert_close((one - x).flatten(1).norm(dim=1), torch.tensor([0.3, 0.3, 0.0], dtype=torch.float64))


def test_random_starts_of_large_images_in_float32_are_not_all_the_middle() -> None:
    """A sum of 150,528 numbers in float32 has no digits behind the point: every start was x itself."""
    x = torch.full((4, 3, 224, 224), 0.5)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    lengths = (Ball(3.0, "l2").random_point(x, noise) - x).flatten(1).norm(dim=1)
    assert (lengths > 0.9 * 3.0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball(norm: str) -> None:
    x = torch.full((4000, 1, 1, 2), 0.5, dtype=torch.float64)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    delta = (Ball(0.1, norm).random_point(x, noise) - x).flatten(1) / 0.1  # type: ignore[arg-type]
    assert abs(delta.mean()) < 0.05
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert size.max() <= 1 + 1e-9
    assert abs((size < math.sqrt(0.5)).double().mean() - 0.5) < 0.05  # half of the area lies within √½ of the middle
