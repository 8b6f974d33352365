"""Image operations on batches, and draws that belong to an image: what the corruptions are made of.

# n images, S side. Images are float32 (n, C, S, S) on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from clae_dist.data.draws import uniforms


@dataclass(frozen=True)
class Draws:
    """Uniform numbers that are functions of an image's id and a key."""

    ids: np.ndarray
    key: tuple[int, ...]

    def uniform(self, *shape: int) -> torch.Tensor:
        """float64 in (0, 1), shape (n, *shape), the same for an image whatever the batch is."""
        count = math.prod(shape)
        values = uniforms(count, *self.key, self.ids) + 2.0**-54
        return torch.from_numpy(values).reshape(len(self.ids), *shape)

    def of(self, number: int) -> Draws:
        """Further draws of the same images."""
        return Draws(self.ids, (*self.key, number))


def gaussian_kernel(sigma: float, radius: int) -> torch.Tensor:
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return (kernel / kernel.sum()).float()


def filtered(x: torch.Tensor, kernel: torch.Tensor, mode: str) -> torch.Tensor:
    """Every channel with one odd kernel (h, w)."""
    up, left = kernel.shape[0] // 2, kernel.shape[1] // 2
    planes = F.pad(x.flatten(0, 1)[:, None], (left, left, up, up), mode=mode)
    return F.conv2d(planes, kernel[None, None]).reshape(x.shape)


def gaussian_blur(x: torch.Tensor, sigma: float, truncate: float = 4.0, mode: str = "replicate") -> torch.Tensor:
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return x
    kernel = gaussian_kernel(sigma, radius)
    return filtered(filtered(x, kernel[None, :], mode), kernel[:, None], mode)


def mirrored(x: torch.Tensor, pad: int) -> torch.Tensor:
    """Mirror at the edges of the outer pixels (d c b a | a b c d | d c b a), as often as `pad` needs."""
    side = x.shape[2]
    index = torch.arange(-pad, side + pad) % (2 * side)
    index = torch.where(index < side, index, 2 * side - 1 - index)
    return x[:, :, index][:, :, :, index]


def affine(x: torch.Tensor, moved_n32: torch.Tensor) -> torch.Tensor:
    """The affine map that moves three corners of a central square by these offsets (x, y)."""
    side = x.shape[2]
    centre, third = float(side // 2), float(side // 3)
    corners = torch.tensor(
        [[centre + third, centre + third], [centre + third, centre - third], [centre - third, centre - third]],
        dtype=torch.float64,
    )
    ones = torch.ones((len(x), 3, 1), dtype=torch.float64)
    there = torch.cat([corners + moved_n32, ones], 2)
    # (x, y, 1) of the result times this is (x, y) of the source.
    back_n32 = torch.linalg.solve(there, corners.expand(len(x), 3, 2))
    y, x_ = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    grid = torch.stack([x_, y, torch.ones_like(y)], 2).double().reshape(1, -1, 3)
    source = (grid @ back_n32).reshape(len(x), side, side, 2)
    return _bilinear(x, source[..., 0].float(), source[..., 1].float())


def displaced(x: torch.Tensor, shift_n2SS: torch.Tensor) -> torch.Tensor:
    pixel = torch.arange(x.shape[2], dtype=torch.float32)
    return _bilinear(x, pixel[None, None, :] + shift_n2SS[:, 0], pixel[None, :, None] + shift_n2SS[:, 1])


def _bilinear(x: torch.Tensor, column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """The image at these coordinates in pixels, mirrored beyond its edges."""
    side = x.shape[2]
    grid = torch.stack([column, row], 3) * (2 / max(1, side - 1)) - 1
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


def box_matrix(size: int, new: int) -> np.ndarray:
    """The (new, size) matrix of Pillow's box filter."""
    identity = Image.fromarray(np.eye(size, dtype=np.float32))
    return np.asarray(identity.resize((size, new), Image.Resampling.BOX))


def plasma(draws: Draws, size: int, decay: float) -> torch.Tensor:
    """Fractal height maps (n, size, size) in [0, 1] that wrap around; `size` is a power of 2. Reference: Fournier 1982."""
    heights = torch.zeros((len(draws.ids), size, size), dtype=torch.float64)
    step, amplitude, turn = size, 100.0, 0
    while step >= 2:
        half, many = step // 2, size // step

        def noise(turn: int, many: int = many, amplitude: float = amplitude) -> torch.Tensor:
            return amplitude**2 * (2 * draws.of(turn).uniform(many, many) - 1)

        corners = heights[:, ::step, ::step].clone()
        pairs = corners + corners.roll(-1, 1)
        centres = (pairs + pairs.roll(-1, 2)) / 4 + noise(turn)
        above = (centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)) / 4 + noise(turn + 1)
        beside = (centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)) / 4 + noise(turn + 2)
        heights[:, half::step, half::step] = centres
        heights[:, ::step, half::step] = above
        heights[:, half::step, ::step] = beside
        step, amplitude, turn = half, amplitude / decay, turn + 3
    low, high = heights.amin((1, 2), keepdim=True), heights.amax((1, 2), keepdim=True)
    return (heights - low) / (high - low)
