"""Cut two views of an image that is decoded once.

# n samples. Every choice comes from uniform numbers in [0, 1) that the caller drew (draws.py), CROP_DRAWS a view.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

CROP_TRIES = 10
CROP_DRAWS = 2 * CROP_TRIES + 2
MAX_RATIO = 32  # of the sides of an image that is resized as a whole


def crop_boxes(
    draws: np.ndarray, heights: np.ndarray, widths: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Boxes (n, 4) of top, left, height, width, as torchvision's RandomResizedCrop. Reference: Szegedy et al. 2015.

    Ten trials of an area (uniform in `scale`) and a ratio (log-uniform in `ratio`): the first that fits is used, else the
    largest central box within the ratio. `draws` has the shape (n, CROP_DRAWS).
    """
    heights, widths = heights.astype(np.float64), widths.astype(np.float64)
    area = (heights * widths)[:, None] * (scale[0] + draws[:, :CROP_TRIES] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + draws[:, CROP_TRIES : 2 * CROP_TRIES] * (high - low))
    w, h = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    fits = (w > 0) & (h > 0) & (w <= widths[:, None]) & (h <= heights[:, None])
    row, first = np.arange(len(draws)), fits.argmax(1)
    any_fits = fits[row, first]

    too_narrow, too_wide = widths / heights < ratio[0], widths / heights > ratio[1]
    central_w = np.where(too_wide, np.round(heights * ratio[1]), widths)
    central_h = np.where(too_narrow, np.round(widths / ratio[0]), heights)
    w, h = np.where(any_fits, w[row, first], central_w), np.where(any_fits, h[row, first], central_h)
    top = np.where(any_fits, np.floor(draws[:, -2] * (heights - h + 1)), (heights - h) // 2)
    left = np.where(any_fits, np.floor(draws[:, -1] * (widths - w + 1)), (widths - w) // 2)
    return np.stack([top, left, h, w], 1).astype(np.int64)


def resized_crop(image_3HW: torch.Tensor, box: np.ndarray, size: int) -> torch.Tensor:
    """uint8 (3, size, size): the box of an image, antialiased bilinear. Interleaved, as decoders write it."""
    top, left, height, width = box.tolist()
    cut = image_3HW[None, :, top : top + height, left : left + width]
    if (height, width) == (size, size):
        return cut[0]
    cut = cut.contiguous(memory_format=torch.channels_last)  # torch's fast way; a strided cut takes twice as long
    return F.interpolate(cut, (size, size), mode="bilinear", antialias=True)[0]


def shifted_view(image_3HW: torch.Tensor, draws: np.ndarray, size: int) -> torch.Tensor:
    """uint8 (3, size, size): the centre view, moved by up to an eighth of its side, with black where it ends.

    `draws` are two uniform numbers. At 32 pixels it is the usual crop of CIFAR with a padding of 4.
    """
    pad = size // 8
    padded = F.pad(centre_view(image_3HW, size), (pad,) * 4)
    top, left = (int(draw * (2 * pad + 1)) for draw in draws)
    return padded[:, top : top + size, left : left + size]


def supervised_view(image_3HW: torch.Tensor, draws: np.ndarray, size: int) -> torch.Tensor:
    """uint8 (3, size, size): the usual view of training with labels, mirrored or not. `draws`: CROP_DRAWS + 1 uniform numbers.

    Up to 64 pixels the centre view, moved (`shifted_view`); above, a crop of 8 to 100 % of the image, resized.
    """
    if size <= 64:
        view = shifted_view(image_3HW, draws[:2], size)
    else:
        height, width = (np.array([length]) for length in image_3HW.shape[1:])
        view = resized_crop(image_3HW, crop_boxes(draws[None, :-1], height, width, (0.08, 1.0), (3 / 4, 4 / 3))[0], size)
    return view.flip(2) if draws[-1] < 0.5 else view


def centre_view(image_3HW: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (3, size, size) for evaluation: the short side to size / 0.875 (256 for 224), then the centre.

    Images up to 64 pixels are shrunk or enlarged to `size` and not cut. Of an image more than MAX_RATIO times as long as wide
    only the middle is resized, for an image of 1 x 40,000 pixels would grow to 256 x 10 million.
    """
    image_3HW = _without_far_ends(image_3HW)
    height, width = image_3HW.shape[1:]
    short = size if size <= 64 else round(size / 0.875)
    factor = short / min(height, width)
    new = (max(size, round(height * factor)), max(size, round(width * factor)))
    if new != (height, width):
        image_3HW = F.interpolate(image_3HW[None], new, mode="bilinear", antialias=True)[0]
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    return image_3HW[:, top : top + size, left : left + size]


def _without_far_ends(image_3HW: torch.Tensor) -> torch.Tensor:
    """The middle of a very long image, with the same centre; of any other the image itself."""
    for dim in (1, 2):
        length, kept = image_3HW.shape[dim], MAX_RATIO * min(image_3HW.shape[1:])
        if length > kept:
            kept += (length - kept) % 2  # as much on both sides
            image_3HW = image_3HW.narrow(dim, (length - kept) // 2, kept)
    return image_3HW
