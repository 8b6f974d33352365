"""Objectives against the double loop, and what must hold for any of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from clae_dist.contrast.adversary import Ball, perturb
from clae_dist.contrast.log_sum_exp import LOG_SUM_EXP
from clae_dist.contrast.objectives import OBJECTIVES, Rows
from tests import reference

N, D = 6, 5


def unit_rows(seed: int, dtype: torch.dtype = torch.float64, count: int = N) -> torch.Tensor:
    rows = torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=1).to(dtype)


def loss_of(form: str, name: str, a: torch.Tensor, b: torch.Tensor, temperature: float, chunk: int = 0) -> torch.Tensor:
    """Of one rank that has all rows, in either form."""
    rows = Rows(a, a), Rows(b, b)
    if form == "log_sum_exp":
        return LOG_SUM_EXP[name](*rows, 0, temperature, chunk, None)
    return OBJECTIVES[name](*rows, 0, temperature, chunk)


# An objective may have the form of log_sum_exp.py, too; only then must it go through the matrix a few columns at a time.
FORMS = [*(("plain", name) for name in OBJECTIVES), *(("log_sum_exp", name) for name in LOG_SUM_EXP)]
every = pytest.mark.parametrize(("form", "name"), FORMS)
chunked = pytest.mark.parametrize(("form", "name"), [(form, name) for form, name in FORMS if name in LOG_SUM_EXP])


@every
@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("chunk", [0, 1, 4])
def test_value_and_gradient_equal_the_double_loop(form: str, name: str, temperature: float, chunk: int) -> None:
    a, b = unit_rows(0).requires_grad_(), unit_rows(1).requires_grad_()
    fast, slow = loss_of(form, name, a, b, temperature, chunk), reference.OBJECTIVES[name](a, b, temperature)
    tight = 1e-12 / temperature  # float64: only the order of summation differs
    assert abs(fast - slow) < tight
    for got, wanted in zip(torch.autograd.grad(fast, (a, b)), torch.autograd.grad(slow, (a, b)), strict=True):
        torch.testing.assert_close(got, wanted, atol=tight, rtol=0)


@every
def test_a_constant_view_leaves_the_others_gradient_as_it_is(form: str, name: str) -> None:
    """What the attack asks for: the anchors are constants."""
    a, b = unit_rows(0), unit_rows(1).requires_grad_()
    (fast,) = torch.autograd.grad(loss_of(form, name, a, b, 0.2), b)
    (slow,) = torch.autograd.grad(reference.OBJECTIVES[name](a, b, 0.2), b)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_mean_over_ranks_is_the_whole(name: str) -> None:
    """Positives of a later rank at the wrong offset would leave the loss near log N."""
    a, b = unit_rows(0), unit_rows(1)
    parts = [OBJECTIVES[name](Rows(a[r : r + 2], a), Rows(b[r : r + 2], b), r, 0.2) for r in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), reference.OBJECTIVES[name](a, b, 0.2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", ["plain", "log_sum_exp"])
def test_nt_xent_does_not_know_which_view_came_first(form: str) -> None:
    a, b = unit_rows(0), unit_rows(1)
    torch.testing.assert_close(loss_of(form, "nt_xent", a, b, 0.2), loss_of(form, "nt_xent", b, a, 0.2), atol=1e-12, rtol=0)


@every
def test_the_order_of_images_does_not_matter(form: str, name: str) -> None:
    a, b = unit_rows(0), unit_rows(1)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(loss_of(form, name, a, b, 0.2), loss_of(form, name, a[order], b[order], 0.2), atol=1e-12, rtol=0)


@every
def test_small_temperatures_and_bfloat16_stay_finite(form: str, name: str) -> None:
    a, b = (unit_rows(seed, torch.bfloat16, 64).requires_grad_() for seed in (0, 1))
    loss = loss_of(form, name, a, b, 0.01, chunk=7)
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    wanted = loss_of(form, name, a.detach().double(), b.detach().double(), 0.01)
    torch.testing.assert_close(loss.double(), wanted, atol=1e-3, rtol=1e-4)  # float32 sums over the same bfloat16 rows
    for gradient in torch.autograd.grad(loss, (a, b)):
        assert gradient.isfinite().all()
        assert gradient.dtype == torch.bfloat16


@chunked
def test_the_whole_similarity_matrix_never_exists(form: str, name: str) -> None:
    """Memory grows with the rows, not with their square: no tensor of a step is larger than a chunk, or all rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    rows, chunk = 512, 16
    a, b = (unit_rows(seed, torch.float32, rows).requires_grad_() for seed in (0, 1))
    with Largest() as largest:
        loss_of(form, name, a, b, 0.2, chunk).backward()
    assert largest.elements == max(rows * chunk, rows * D)


# ---- the attack ----


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
