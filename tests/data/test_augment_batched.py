"""The augmentation for GPUs against the one for the CPU, and the counts that it is held to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clae_dist.config import Augment
from clae_dist.counts import Counts, counted
from clae_dist.data import augment_batched as batched
from clae_dist.data.augment import AUGMENT_DRAWS, BLUR, FLIP, GREY, JITTER, ORDER, augment
from clae_dist.data.augment_batched import augment_batched

NOTHING = Augment(flip=0.0, jitter=0.0, grey=0.0, blur=0.0)
STRONG = Augment(hue=0.5, blur=0.5)
SIDE = 20


def every_choice() -> torch.Tensor:
    """Draws (1, 24 · 16 · 2, A): every order with every combination of flip, jitter, grey and blur, twice."""
    orders, chosen, _ = torch.meshgrid(torch.arange(24), torch.arange(16), torch.arange(2), indexing="ij")
    draws = torch.rand(orders.numel(), AUGMENT_DRAWS, generator=torch.Generator().manual_seed(0)).clamp_max(1 - 2**-24)
    draws[:, ORDER] = (orders.flatten() + 0.5) / 24
    for bit, column in enumerate((FLIP, JITTER, GREY, BLUR)):
        draws[:, column] = torch.where((chosen.flatten() >> bit) % 2 == 1, 0.01, 0.99)
    return draws[None]


def images(draws: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """uint8 (V, n, 3, S, S), interleaved as from the loader, with pixels that are grey, black and white among them."""
    shape = (*draws.shape[:2], side, side, 3)
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    pixels[:, :, 0, :3] = torch.tensor([0, 255, 77], dtype=torch.uint8)[:, None]
    pixels[:, :, 1, :3, 0] = pixels[:, :, 1, :3, 1]
    return pixels.permute(0, 1, 4, 2, 3)


def difference(settings: Augment, dtype: torch.dtype) -> float:
    draws = every_choice()
    views = images(draws)
    expected = augment(views[0].contiguous().to(dtype) / 255, draws[0], settings)
    return float((augment_batched(views, draws, [settings], dtype)[0] - expected).abs().max())


@pytest.mark.parametrize("strength", [0.8, 1.0, 1.7])  # from 1 on, factors can be 0
def test_every_order_and_choice_equals_the_grouped_augmentation(strength: float) -> None:
    settings = replace(STRONG, brightness=strength, contrast=strength, saturation=strength)
    assert difference(settings, torch.float64) < 1e-12
    assert difference(settings, torch.float32) < 3e-5  # bounds of up to 1 / factor, and the hue there and back


def test_factors_of_zero() -> None:
    draws = every_choice()
    draws[:, :, 3:6] = 0.0  # black, the mean, and grey
    settings = replace(STRONG, brightness=1.0, contrast=1.0, saturation=1.0)
    views = images(draws)
    expected = augment(views[0].contiguous().double() / 255, draws[0], settings)
    torch.testing.assert_close(augment_batched(views, draws, [settings], torch.float64)[0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("stage", range(7))
def test_a_missing_stage_is_seen(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    stages = batched._STAGES
    monkeypatch.setattr(batched, "_STAGES", stages[:stage] + stages[stage + 1 :])
    assert difference(STRONG, torch.float64) > 1e-2


def test_views_with_settings_of_their_own() -> None:
    draws = torch.rand(3, 16, AUGMENT_DRAWS, generator=torch.Generator().manual_seed(2)) * 0.999
    views, flips = images(draws), Augment().weakened(0.0)
    together = augment_batched(views, draws, [STRONG, flips, NOTHING])
    for view, one in enumerate((STRONG, flips, NOTHING)):
        alone = augment_batched(views[view : view + 1], draws[view : view + 1], [one])[0]
        torch.testing.assert_close(together[view], alone, atol=1e-6, rtol=0)  # float32, another batch of products
    torch.testing.assert_close(together[2], views[2].float() / 255, atol=1e-7, rtol=0)


def counts(settings: Augment) -> tuple[Counts, float]:
    """Counts of both views of 128 images of 224 pixels, and their bytes beside reading uint8 and writing float32 once."""
    draws = torch.rand(2, 128, AUGMENT_DRAWS, generator=torch.Generator().manual_seed(0)) * 0.999
    views = torch.empty(2, 128, 224, 224, 3, dtype=torch.uint8, device="meta").permute(0, 1, 4, 2, 3)
    augment_batched(views, draws, [settings] * 2)  # a first time: what is kept for the next steps
    found = counted(lambda: augment_batched(views, draws, [settings] * 2), "meta")
    return found, found.bytes / (views.numel() * (1 + 4))


def test_both_views_take_few_kernels_and_no_host_wait() -> None:
    found, times = counts(Augment(blur=0.5))
    assert found.kernels <= 40
    assert found.waits == 0
    assert times < 30
    grouped = counted(lambda: augment(torch.empty(128, 3, 224, 224, device="meta"), every_choice()[0, :128], STRONG), "meta")
    assert grouped.waits > 10  # the counter sees them
