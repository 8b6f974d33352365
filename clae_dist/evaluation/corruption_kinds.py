"""Thirteen corruptions of images in five severities, as pure functions of the image, the severity and the image's id.

The kinds and constants are those of the common-corruption benchmarks that need no photographs (snow and frost are missing):
for 32 pixels those of CIFAR-10-C, for photographs those of ImageNet-C. The images are not those benchmarks' files: the random
numbers, the motion blur (a line kernel) and the resampling differ. Reference: Hendrycks and Dietterich 2019.

# n images, S side. Images are float32 (n, 3, S, S) in [0, 1] within this file.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from clae_dist.data.draws import hashed
from clae_dist.evaluation.image_operations import (
    Draws,
    affine,
    box_matrix,
    displaced,
    filtered,
    gaussian_blur,
    gaussian_kernel,
    mirrored,
    plasma,
)

Constants = Literal["cifar", "imagenet"]
SEVERITIES = (1, 2, 3, 4, 5)
LARGEST_CIFAR = 64  # pixels a side, up to which CIFAR-10-C's constants are right


# ---- noise ----


def _gaussian_noise(x: torch.Tensor, sigma: float, draws: Draws) -> torch.Tensor:
    return x + sigma * torch.special.ndtri(draws.uniform(*x.shape[1:])).float()


def _shot_noise(x: torch.Tensor, photons: float, draws: Draws) -> torch.Tensor:
    """Poisson counts of x · photons, by inversion. The images have 256 levels, so that there are 256 distributions."""
    largest = int(photons + 10 * math.sqrt(photons) + 20)
    rate_L1 = torch.arange(256, dtype=torch.float64)[:, None] / 255 * photons
    count_K = torch.arange(largest, dtype=torch.float64)
    log_pmf_LK = torch.xlogy(count_K, rate_L1) - rate_L1 - torch.lgamma(count_K + 1)
    cdf_LK = log_pmf_LK.exp().cumsum(1).clamp_max(1)
    cdf_LK[:, -1] = 1
    level = (255 * x).round().long().clamp(0, 255)
    # One sorted table: level l has the values l to l + 1.
    table = (cdf_LK + torch.arange(256, dtype=torch.float64)[:, None]).flatten()
    position = torch.searchsorted(table, draws.uniform(*x.shape[1:]) + level)
    return (position - level * largest).float() / photons


def _impulse_noise(x: torch.Tensor, share: float, draws: Draws) -> torch.Tensor:
    """Salt and pepper on each channel of its own."""
    draw = draws.uniform(*x.shape[1:])
    return torch.where(draw < share / 2, 0.0, torch.where(draw < share, 1.0, x))


# ---- blur ----


def _defocus_blur(x: torch.Tensor, disk: tuple[float, float], draws: Draws) -> torch.Tensor:
    """A disk whose edge is smoothed by a small Gaussian."""
    radius, smoothing = disk
    reach = 8 if radius <= 8 else int(radius)
    offset = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = ((offset[:, None] ** 2 + offset[None, :] ** 2) <= radius**2).float()
    kernel = kernel / kernel.sum()
    edge = gaussian_kernel(smoothing, 1 if radius <= 8 else 2)
    kernel = filtered(kernel[None, None], edge[:, None] * edge[None, :], "reflect")[0, 0]
    support = int((kernel.amax(0) > 0).nonzero()[:, 0].min())
    kernel = kernel[support : len(kernel) - support, support : len(kernel) - support]
    return filtered(x, kernel, "reflect" if len(kernel) // 2 < x.shape[2] else "replicate")


def _glass_blur(x: torch.Tensor, glass: tuple[float, int, int], draws: Draws) -> torch.Tensor:
    """Blur, pixels that take the place of neighbours, blur.

    The published code means to swap two pixels but assigns one after the other, so that the first takes the second's value
    and the second keeps it; this does the same.
    """
    sigma, reach, rounds = glass
    side = x.shape[2]
    pixels = (255 * gaussian_blur(x, sigma)).byte().permute(0, 2, 3, 1).contiguous()
    image = torch.arange(len(x))
    places = range(side - reach, reach, -1)
    for turn in range(rounds):
        shift = (draws.of(turn).uniform(2, len(places), len(places)) * 2 * reach).floor().long() - reach
        down, right = shift.permute(1, 2, 3, 0)
        for i, row in enumerate(places):
            for j, column in enumerate(places):
                pixels[:, row, column] = pixels[image, row + down[i, j], column + right[i, j]]
    return gaussian_blur(pixels.permute(0, 3, 1, 2).float() / 255, sigma)


def _motion_blur(x: torch.Tensor, line: tuple[int, float], draws: Draws) -> torch.Tensor:
    """Mean along a line of 2 · radius + 1 pixels from each pixel on, with the weights of half a Gaussian; -45° to 45°."""
    radius, sigma = line
    side = x.shape[2]
    weights = torch.exp(-0.5 * (torch.arange(2 * radius + 1, dtype=torch.float64) / sigma) ** 2)
    angle_n = (draws.uniform(1)[:, 0] - 0.5) * (math.pi / 2)
    pixel = torch.arange(side)
    image = torch.arange(len(x))[:, None, None]
    planes = x.permute(0, 2, 3, 1)
    blurred = torch.zeros_like(planes)
    for step, weight in enumerate((weights / weights.sum()).tolist()):
        row_nS = (pixel + (step * angle_n.sin()).round().long()[:, None]).clamp(0, side - 1)
        column_nS = (pixel + (step * angle_n.cos()).round().long()[:, None]).clamp(0, side - 1)
        blurred += weight * planes[image, row_nS[:, :, None], column_nS[:, None, :]]
    return blurred.permute(0, 3, 1, 2)


def _zoom_blur(x: torch.Tensor, zooms: Sequence[float], draws: Draws) -> torch.Tensor:
    """Mean of the image and of its centre under increasing zoom, of which the first is 1."""
    side = x.shape[2]
    total = x.clone()
    for zoom in zooms:
        cut = math.ceil(side / zoom)
        top, size = (side - cut) // 2, round(cut * zoom)
        enlarged = x[:, :, top : top + cut, top : top + cut]
        enlarged = F.interpolate(enlarged, (size, size), mode="bilinear", align_corners=True)
        trim = (size - side) // 2
        total += enlarged[:, :, trim : trim + side, trim : trim + side]
    return total / (len(zooms) + 1)


# ---- weather, colour, geometry, encoding ----


def _fog(x: torch.Tensor, fog: tuple[float, float], draws: Draws) -> torch.Tensor:
    density, decay = fog
    side = x.shape[2]
    mist = plasma(draws, max(2, 1 << (side - 1).bit_length()), decay)[:, None, :side, :side].float()
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + density * mist) * brightest / (brightest + density)


def _brightness(x: torch.Tensor, added: float, draws: Draws) -> torch.Tensor:
    """Add to the value of hue, saturation and value: the channels keep their ratios. Black becomes grey."""
    value = x.amax(1, keepdim=True)
    brighter = (value + added).clamp_max(1)
    return torch.where(value > 0, x * (brighter / value.clamp_min(1e-6)), brighter)


def _contrast(x: torch.Tensor, factor: float, draws: Draws) -> torch.Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _elastic(x: torch.Tensor, constants: tuple[float, float, float], draws: Draws) -> torch.Tensor:
    """A random affine map, then a smooth random displacement of every pixel. Constants are shares of the side."""
    side = x.shape[2]
    height, sigma, jitter = (side * constant for constant in constants)
    x = affine(x, (2 * draws.of(0).uniform(3, 2) - 1) * jitter)
    if height == 0:
        return x
    noise = 2 * draws.of(1).uniform(2, side, side).float() - 1
    shift = height * gaussian_blur(mirrored(noise, pad := int(3 * sigma + 0.5)), sigma, truncate=3)
    return displaced(x, shift[:, :, pad : pad + side, pad : pad + side])


def _pixelate(x: torch.Tensor, factor: float, draws: Draws) -> torch.Tensor:
    """Area averages on a coarser grid, and back."""
    side = x.shape[2]
    small = max(1, int(side * factor))
    there = box_matrix(side, small)
    back = box_matrix(small, side)
    matrix = torch.from_numpy(back @ there)
    return matrix @ x @ matrix.T


def _jpeg(x: torch.Tensor, quality: int, draws: Draws) -> torch.Tensor:
    decoded = []
    for image in (255 * x).round().byte().permute(0, 2, 3, 1).numpy():
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(stream)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class _Kind:
    function: Callable[[torch.Tensor, Any, Draws], torch.Tensor]
    cifar: tuple[Any, ...]  # by severity
    imagenet: tuple[Any, ...]


def _zooms(largest: Sequence[float], steps: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    return tuple(
        tuple(1 + step * i for i in range(int((last - 1) / step + 1e-6) + 1)) for last, step in zip(largest, steps, strict=True)
    )


_KINDS = {
    "gaussian_noise": _Kind(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": _Kind(_shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": _Kind(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": _Kind(
        _defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": _Kind(
        _glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": _Kind(
        _motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": _Kind(
        _zoom_blur,
        _zooms((1.05, 1.10, 1.15, 1.20, 1.25), (0.01,) * 5),
        _zooms((1.10, 1.15, 1.20, 1.25, 1.30), (0.01, 0.01, 0.02, 0.02, 0.03)),
    ),
    "fog": _Kind(
        _fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": _Kind(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": _Kind(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic": _Kind(
        _elastic,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "pixelate": _Kind(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": _Kind(_jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
KINDS = tuple(_KINDS)


def corrupt(
    images_n3SS: torch.Tensor, kind: str, severity: int, ids_n: np.ndarray, seed: int = 0, constants: Constants = "cifar"
) -> torch.Tensor:
    """Corrupt uint8 images (n, 3, S, S) on the CPU; the result has the same type and shape. Severity 0 returns them.

    An image's result depends on its pixels and id, `seed`, `kind` and `severity` only, and not on the rest of the batch.
    """
    if severity == 0:
        return images_n3SS
    entry = _KINDS[kind]
    constant = (entry.cifar if constants == "cifar" else entry.imagenet)[severity - 1]
    draws = Draws(hashed(np.asarray(ids_n)), (seed, KINDS.index(kind), severity))
    corrupted = entry.function(images_n3SS.float() / 255, constant, draws)
    return (255 * corrupted).round().clamp(0, 255).byte()
