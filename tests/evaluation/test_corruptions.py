from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
import torch

from clae_dist.evaluation import corruption_kinds, image_operations
from clae_dist.evaluation.corruption_kinds import KINDS, SEVERITIES, corrupt
from clae_dist.evaluation.image_operations import Draws, plasma

RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "fog", "elastic")


def _photograph(count: int = 4, side: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth colours with edges and texture, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    fine = torch.rand(count, 3, side, side, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic") + 0.25 * (fine - 0.5)
    image[:, :, side // 3 : side // 2, side // 4 :] *= 0.3
    return (255 * image.clamp(0, 1)).byte()


def _grey(count: int = 4, side: int = 64, level: int = 128) -> torch.Tensor:
    return torch.full((count, 3, side, side), level, dtype=torch.uint8)


IDS = np.arange(4)


@pytest.mark.parametrize("constants", ["cifar", "imagenet"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_pure_function_of_the_image(kind: str, constants: str) -> None:
    """Neither the batch nor the order in it matter: ranks that share a set corrupt its images alike."""
    images = _photograph()
    for severity in (1, 5):
        whole = corrupt(images, kind, severity, IDS, 3, constants)  # type: ignore[arg-type]
        assert (whole.dtype, whole.shape) == (images.dtype, images.shape)
        assert not torch.equal(whole, images)
        order = [2, 0]
        part = corrupt(images[order], kind, severity, IDS[order], 3, constants)  # type: ignore[arg-type]
        # float32: a convolution's order of summation depends on the shape of the batch
        assert int((part.int() - whole[order].int()).abs().max()) <= 1
        assert torch.equal(corrupt(images, kind, severity, IDS, 3, constants), whole)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_severity_0_is_the_image(kind: str) -> None:
    assert torch.equal(corrupt(_photograph(), kind, 0, IDS), _photograph())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("elastic", "glass_blur")])
@pytest.mark.parametrize("constants", ["cifar", "imagenet"])
def test_the_change_grows_with_the_severity(kind: str, constants: str) -> None:
    """elastic and glass_blur are not in it: their published constants are not monotone in any one number.

    A grid of pixelate may fit the edges of these images better than a finer one.
    """
    images, ids = _photograph(64), np.arange(64)
    size = [
        float((corrupt(images, kind, s, ids, 0, constants).float() - images).square().mean())  # type: ignore[arg-type]
        for s in SEVERITIES
    ]
    # Severities 3 and 4 of CIFAR's motion blur are the same kernel, but for its negligible end, at other angles.
    assert kind == "pixelate" or all(0.9 * small < large for small, large in itertools.pairwise(size)), size
    assert size[0] < size[2]
    assert size[1] < size[4]


@pytest.mark.parametrize("kind", RANDOM)
def test_draws_depend_on_image_and_seed(kind: str) -> None:
    images = _photograph(1).repeat(3, 1, 1, 1)
    result = corrupt(images, kind, 5, np.array([7, 7, 8]))
    assert torch.equal(result[0], result[1])
    assert not torch.equal(result[0], result[2])
    assert not torch.equal(corrupt(images, kind, 5, np.array([7, 7, 8]), seed=1)[0], result[0])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in RANDOM])
def test_the_other_kinds_draw_nothing(kind: str) -> None:
    images = _photograph(1).repeat(2, 1, 1, 1)
    result = corrupt(images, kind, 5, np.array([7, 8]))
    assert torch.equal(result[0], result[1])


def test_the_constants_of_noise_are_those_that_it_has() -> None:
    images, ids = _grey(40), np.arange(40)
    for severity, sigma in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noise = (corrupt(images, "gaussian_noise", severity, ids).double() - 128) / 255
        assert float(noise.std()) == pytest.approx(sigma, rel=0.01)
        assert abs(float(noise.mean())) < 0.001
    for severity, photons in zip(SEVERITIES, (60, 25, 12, 5, 3), strict=True):
        shot = corrupt(_grey(40, level=77), "shot_noise", severity, ids, 0, "imagenet").double() / 255
        rate = 77 / 255
        assert float(shot.mean()) == pytest.approx(min(rate, 1), rel=0.02)
        if photons > 20:  # below that, the cut at 1 shows
            assert float(shot.std()) == pytest.approx((rate / photons) ** 0.5, rel=0.02)
    for severity, share in zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.07), strict=True):
        noisy = corrupt(images, "impulse_noise", severity, ids)
        for level in (0, 255):
            assert float((noisy == level).double().mean()) == pytest.approx(share / 2, rel=0.1)


def test_shot_noise_is_poissons() -> None:
    """Level 51 and 10 photons: a rate of 2, counts by inversion of the distribution function."""
    draws = Draws(np.arange(30), (0, 1, 2))
    image = torch.full((30, 3, 32, 32), 51 / 255)
    counts = (10 * corruption_kinds._shot_noise(image, 10, draws)).round().long().flatten()
    expected = torch.exp(torch.distributions.Poisson(2.0).log_prob(torch.arange(8.0)))
    observed = torch.bincount(counts, minlength=8)[:8] / len(counts)
    assert float((observed - expected).abs().max()) < 0.005  # 92,160 draws: three deviations


def test_brightness_is_that_of_hue_saturation_and_value() -> None:
    images = _photograph(2)
    images[0, :, 3, 3] = 0  # black becomes grey
    for image, result in zip(images, corrupt(images, "brightness", 3, IDS[:2]), strict=True):
        hsv = cv2.cvtColor((image.permute(1, 2, 0).float() / 255).numpy(), cv2.COLOR_RGB2HSV)
        hsv[:, :, 2] = np.clip(hsv[:, :, 2] + 0.15, 0, 1)
        expected = 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        assert np.abs(expected - result.permute(1, 2, 0).numpy()).max() < 1  # rounding


@pytest.mark.parametrize(
    ("severity", "constants"), [(1, "cifar"), (4, "cifar"), (5, "cifar"), (2, "imagenet"), (5, "imagenet")]
)
def test_defocus_is_opencvs_filter(severity: int, constants: str) -> None:
    table = corruption_kinds._KINDS["defocus_blur"]
    radius, smoothing = (table.cifar if constants == "cifar" else table.imagenet)[severity - 1]
    image = _photograph(1, 48)
    reach, size = (8, 3) if radius <= 8 else (int(radius), 5)
    x, y = np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1))
    disk = (x**2 + y**2 <= radius**2).astype(np.float32)
    disk = cv2.GaussianBlur(disk / disk.sum(), (size, size), sigmaX=smoothing)
    expected = cv2.filter2D(image[0].permute(1, 2, 0).numpy().astype(np.float32), -1, disk)
    result = corrupt(image, "defocus_blur", severity, IDS[:1], 0, constants)  # type: ignore[arg-type]
    assert np.abs(expected - result[0].permute(1, 2, 0).numpy()).max() < 1


def test_contrast_keeps_the_mean_and_scales_the_rest() -> None:
    images = _photograph(3)
    result = corrupt(images, "contrast", 4, IDS[:3]).double()
    assert torch.allclose(result.mean((2, 3)), images.double().mean((2, 3)), atol=0.5)
    assert torch.allclose(result.std((2, 3)), 0.3 * images.double().std((2, 3)), rtol=0.03)


def test_pixelate_is_pillows_box_filter() -> None:
    from PIL import Image

    image = _photograph(1)
    result = corrupt(image, "pixelate", 5, IDS[:1])[0].permute(1, 2, 0).numpy()
    pillow = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    expected = pillow.resize((20, 20), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
    assert np.abs(np.asarray(expected).astype(int) - result).max() <= 2  # Pillow rounds after each of four passes


@pytest.mark.parametrize("kind", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic", "pixelate", "contrast"])
@pytest.mark.parametrize("constants", ["cifar", "imagenet"])
def test_a_flat_image_stays_flat(kind: str, constants: str) -> None:
    """Kernels sum to 1, and nothing black comes in at the edges.

    The published disk reaches the edge of its array, where its smoothing mirrors: ImageNet's defocus sums to 1.017.
    """
    images = _grey(2, 32)
    for severity in SEVERITIES:
        result = corrupt(images, kind, severity, IDS[:2], 0, constants)  # type: ignore[arg-type]
        assert int((result.int() - 128).abs().max()) <= (2 if kind == "defocus_blur" else 1), severity


def test_motion_follows_one_line_to_one_side() -> None:
    image = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    image[:, :, 16, 16] = 255
    trace = corrupt(image, "motion_blur", 5, IDS[:1], 0, "imagenet")[0, 0]
    rows, columns = trace.nonzero().T
    assert int(columns.max()) == 16  # a pixel takes what lies to its right
    assert int(columns.min()) <= 4
    slope = np.polyfit(columns.numpy(), rows.numpy(), 1)[0]
    assert abs(slope) <= 1.05  # at most 45 degrees
    assert float(np.abs(rows.numpy() - 16 - slope * (columns.numpy() - 16)).max()) <= 1


def test_zoom_reaches_the_published_factors() -> None:
    table = corruption_kinds._KINDS["zoom_blur"]
    assert [round(zooms[-1], 2) for zooms in table.cifar] == [1.05, 1.10, 1.15, 1.20, 1.25]
    assert [len(zooms) for zooms in table.imagenet] == [11, 16, 11, 13, 11]


def test_fog_maps_fill_the_range_and_wrap_around() -> None:
    maps = plasma(Draws(np.arange(6), (1,)), 32, 2.0)
    assert maps.amin((1, 2)).tolist() == [0.0] * 6
    assert maps.amax((1, 2)).tolist() == [1.0] * 6
    inner, seam = (maps[:, 1:] - maps[:, :-1]).abs().mean(), (maps[:, 0] - maps[:, -1]).abs().mean()
    assert 0.5 < float(seam / inner) < 2
    rough = plasma(Draws(np.arange(6), (1,)), 32, 1.3)
    assert float((rough[:, 1:] - rough[:, :-1]).abs().mean()) > float(inner)


def test_the_identity_map_and_a_shift() -> None:
    image = _photograph(2).float() / 255
    assert torch.allclose(image_operations.affine(image, torch.zeros(2, 3, 2, dtype=torch.float64)), image, atol=1e-4)
    moved = image_operations.affine(image, torch.full((2, 3, 2), 2.0, dtype=torch.float64))
    assert torch.allclose(moved[:, :, 2:, 2:], image[:, :, :-2, :-2], atol=1e-4)


def test_glass_takes_pixels_from_the_neighbourhood() -> None:
    """Without blur (sigma 0.05) every pixel is one of its neighbours within two assignments."""
    image = _photograph(1)
    result = corrupt(image, "glass_blur", 1, IDS[:1])[0]
    assert float((result != image[0]).any(0).double().mean()) > 0.4
    near = torch.stack([image[0].roll((a, b), (1, 2)) for a in (-2, -1, 0, 1, 2) for b in (-2, -1, 0, 1, 2)])
    assert float(((near == result).all(1).any(0)).double().mean()) > 0.8
