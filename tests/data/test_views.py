"""Crops and augmentation against torchvision's own, parameter by parameter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from clae_dist.config import Augment
from clae_dist.data.augment import (
    AUGMENT_DRAWS,
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GREY,
    HUE,
    JITTER,
    ORDER,
    SATURATION,
    SIGMA,
    augment,
)
from clae_dist.data.views import CROP_DRAWS, centre_view, crop_boxes, resized_crop, supervised_view

NOTHING = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0}


def images(count: int = 6, side: int = 20) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def draws(count: int = 6, **columns: float) -> torch.Tensor:
    table = torch.full((count, AUGMENT_DRAWS), 0.5)
    for name, value in columns.items():
        table[
            :,
            {
                "order": ORDER,
                "brightness": BRIGHTNESS,
                "contrast": CONTRAST,
                "saturation": SATURATION,
                "hue": HUE,
                "sigma": SIGMA,
            }[name],
        ] = value
    return table


def boxes(count: int, height: int, width: int, scale: tuple[float, float] = (0.08, 1.0), seed: int = 0) -> np.ndarray:
    u = np.random.default_rng(seed).random((count, CROP_DRAWS))
    return crop_boxes(u, np.full(count, height), np.full(count, width), scale, (3 / 4, 4 / 3))


def test_boxes_lie_inside_with_the_asked_area_and_ratio() -> None:
    found = boxes(5000, 375, 500)
    top, left, height, width = found.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 375).all()
    assert (left + width <= 500).all()
    area, ratio = height * width / (375 * 500), width / height
    assert 0.075 < area.min() < 0.1
    assert area.max() <= 1
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35


def test_boxes_are_distributed_as_torchvision_s() -> None:
    transform = v2.RandomResizedCrop(224, scale=(0.08, 1.0))
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500, dtype=torch.uint8)
    theirs = np.array(
        [[transform.make_params([image])[key] for key in ("top", "left", "height", "width")] for _ in range(4000)]
    )
    ours = boxes(4000, 375, 500)
    # Means of 4,000 draws with standard deviations below 110 pixels: five standard errors are 9 pixels (12 for a difference).
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 12
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 12


def test_an_image_that_fits_no_box_gets_the_central_one() -> None:
    (found,) = boxes(1, 10, 1000, scale=(1.0, 1.0))
    assert found.tolist() == [0, 493, 10, 13]


def test_resized_crop_is_torchvision_s() -> None:
    image = torch.randint(0, 256, (3, 60, 80), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ours = resized_crop(image, np.array([5, 7, 40, 50]), 32)
    theirs = tv.resized_crop(image, 5, 7, 40, 50, [32, 32], antialias=True)
    assert (ours.int() - theirs.int()).abs().max() <= 1  # another order of rounding to uint8


@pytest.mark.parametrize(("height", "width"), [(300, 500), (500, 300), (224, 224), (40, 30)])
def test_centre_view_has_the_size_and_shows_the_centre(height: int, width: int) -> None:
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, height // 2 - 3 : height // 2 + 3, width // 2 - 3 : width // 2 + 3] = 255
    for size in (32, 224):
        view = centre_view(image, size).float()
        assert view.shape == (3, size, size)
        mass = view[0] / view[0].sum()
        centre = torch.arange(size).float()
        assert abs((mass.sum(0) * centre).sum() - (size - 1) / 2) < 2
        assert abs((mass.sum(1) * centre).sum() - (size - 1) / 2) < 2


def resized_as_a_whole(image: torch.Tensor, size: int) -> torch.Tensor:
    """The centre view without a bound on what is resized."""
    height, width = image.shape[1:]
    factor = (size if size <= 64 else round(size / 0.875)) / min(height, width)
    new = (max(size, round(height * factor)), max(size, round(width * factor)))
    large = torch.nn.functional.interpolate(image[None], new, mode="bilinear", antialias=True)[0]
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    return large[:, top : top + size, left : left + size]


def test_the_view_of_a_very_long_image_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of 1 x 40,000 pixels would be enlarged to 256 x 10,240,000. The pixels of ordinary ones are the same as ever."""
    generator, resize, sizes = torch.Generator().manual_seed(0), torch.nn.functional.interpolate, list[int]()

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        sizes.append(math.prod(arguments[1]))
        return resize(*arguments, **options)

    for height, width in [(1, 1), (1, 32), (32, 1), (20, 640), (33, 47), (500, 300), (224, 224), (300, 2999), (900, 31)]:
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        assert all(torch.equal(centre_view(image, size), resized_as_a_whole(image, size)) for size in (32, 224))
    for short, long in [(1, 3000), (1, 3001), (2, 701), (3, 1000), (7, 3000), (50, 3000)]:
        ramp = ((torch.arange(long) - (long - 1) / 2) * 64 / short + 128).clip(0, 255).to(torch.uint8)  # 2 a pixel of the view
        image = ramp.expand(3, short, long)
        for turned in (image, image.transpose(1, 2)):
            difference = centre_view(turned, 32).int() - resized_as_a_whole(turned, 32).int()
            assert difference.abs().max() <= 2  # at most half a pixel apart, by the rounding of the new length, and rounded
    monkeypatch.setattr(torch.nn.functional, "interpolate", recorded)
    for shape in [(1, 40_000), (40_000, 1), (200, 40_000)]:
        assert centre_view(torch.zeros(3, *shape, dtype=torch.uint8), 224).shape == (3, 224, 224)
    assert len(sizes) == 3
    assert max(sizes) <= 256 * 33 * 256  # 6 MB


def test_nothing_asked_nothing_changed() -> None:
    x = images()
    assert torch.equal(augment(x, draws(), Augment(**NOTHING)), x)


def test_flip_and_grey_touch_the_chosen_images_only() -> None:
    x, table = images(), draws()
    table[:3, FLIP], table[3:, FLIP] = 0.1, 0.9
    table[:2, GREY], table[2:, GREY] = 0.9, 0.1
    out = augment(x, table, Augment(**{**NOTHING, "flip": 0.5, "grey": 0.5}))
    assert torch.equal(out[:2], x[:2].flip(3))
    torch.testing.assert_close(out[2], tv.rgb_to_grayscale(x[2].flip(2), 3), atol=1e-6, rtol=0)  # float32
    torch.testing.assert_close(out[3:], tv.rgb_to_grayscale(x[3:], 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("draw", [0.0, 0.3, 0.99])
def test_each_colour_operation_is_torchvision_s(name: str, draw: float) -> None:
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, name: 0.4}
    out = augment(images(), draws(**{name: draw}), Augment(**{**NOTHING, "jitter": 1.0, **strengths}))
    factor = (2 * draw - 1) * 0.4 + (0 if name == "hue" else 1)
    adjust = {
        "brightness": tv.adjust_brightness,
        "contrast": tv.adjust_contrast,
        "saturation": tv.adjust_saturation,
        "hue": tv.adjust_hue,
    }[name]
    torch.testing.assert_close(out, adjust(images(), factor), atol=2e-5, rtol=0)  # float32, through hue and back


def test_each_image_has_its_own_order_of_operations() -> None:
    """Brightness first and then contrast is not contrast first: a batch with one order for all would differ."""
    table = draws(count=24, brightness=0.95, contrast=0.1)
    table[:, ORDER] = (torch.arange(24) + 0.5) / 24
    settings = Augment(**{**NOTHING, "jitter": 1.0, "saturation": 0.0, "hue": 0.0})
    x = images(1).expand(24, -1, -1, -1)
    out = augment(x, table, settings)
    alone = torch.cat([augment(x[i : i + 1], table[i : i + 1], settings) for i in range(24)])
    torch.testing.assert_close(out, alone, atol=1e-6, rtol=0)
    distinct = {tuple(row.flatten()[:5].mul(1e4).round().tolist()) for row in out}
    assert len(distinct) == 2


def test_blur_is_torchvision_s_with_each_image_s_sigma() -> None:
    x, table = images(side=40), draws()
    table[:, SIGMA] = torch.linspace(0, 0.9, 6)
    table[:, BLUR] = torch.tensor([0.1, 0.9, 0.1, 0.1, 0.1, 0.1])
    out = augment(x, table, Augment(**{**NOTHING, "blur": 0.5}))
    assert torch.equal(out[1], x[1])
    for i in (0, 2, 5):
        sigma = 0.1 + table[i, SIGMA].item() * 1.9
        torch.testing.assert_close(out[i], tv.gaussian_blur(x[i], [5, 5], [sigma, sigma]), atol=1e-5, rtol=0)


def test_jitter_is_applied_to_its_share() -> None:
    table = draws(count=100, brightness=0.0)
    table[:, JITTER] = torch.linspace(0, 0.999, 100)
    x = images(1).expand(100, -1, -1, -1)
    out = augment(x, table, Augment(**{**NOTHING, "jitter": 0.8}))
    assert (out != x).flatten(1).any(1).sum() == 80


def test_supervised_views_of_small_and_of_large_images() -> None:
    image = torch.arange(3 * 16 * 16).reshape(3, 16, 16).to(torch.uint8)
    draws = np.full(CROP_DRAWS + 1, 0.5)
    assert torch.equal(supervised_view(image, draws, 16), image)  # the middle of the padded image
    draws[:2], draws[-1] = (0.0, 0.999), 0.1
    moved = supervised_view(image, draws, 16)  # two rows of black above, two columns at the right, then mirrored
    assert torch.equal(moved[:, 2:, 2:], image[:, :14, 2:].flip(-1))
    assert not moved[:, :2].any()
    assert not moved[:, :, :2].any()
    large = torch.rand((3, 90, 120), generator=torch.Generator().manual_seed(0)).mul(255).to(torch.uint8)
    one, other = (supervised_view(large, np.random.default_rng(seed).random(CROP_DRAWS + 1), 72) for seed in (0, 1))
    assert one.shape == other.shape == (3, 72, 72)
    assert not torch.equal(one, other)
