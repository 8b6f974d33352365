"""Codes of the small windows of an image, equal for windows that look alike.

A code holds the signs of 24 low frequencies of a window of 6x6 pixels, of brightness and two differences of colour. Images are
looked at in their own size (up to 64 pixels) and in halves of it, so that larger patches are found, too. Windows with little
contrast (sky, walls) have no code: they recur in all sets.

# n images of one size H x W, S side of a window, h x w windows of an image, B bits, T templates
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

SIDE = 6
LARGEST = 64  # pixels of the long side of an image
SMALLEST = 2 * SIDE + 4  # pixels of the short side of a level: below it, a window is most of the image
LEVELS = 3
NO_CODE = -1
_CONTRAST = 20.0  # grey levels: the deviation of a window, below which it has no code
_GREY_BITS, _COLOUR_BITS = 12, 6
_IMAGES = 64  # whose windows are in memory at once


@cache
def _filters() -> torch.Tensor:
    """float32 (B, 3, S, S): the frequencies whose signs are the bits of a code."""
    position = (np.arange(SIDE) + 0.5) * np.pi / SIDE
    waves = [(v, u) for v in range(SIDE) for u in range(SIDE)]
    waves.sort(key=lambda vu: (vu[0] + vu[1], vu))
    planes = [np.outer(np.cos(v * position), np.cos(u * position)) for v, u in waves]
    grey, blue, red = (0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081)
    chosen = [(grey, planes[1 : 1 + _GREY_BITS]), (blue, planes[:_COLOUR_BITS]), (red, planes[:_COLOUR_BITS])]
    filters = [np.multiply.outer(weights, plane / np.sqrt((plane**2).sum())) for weights, some in chosen for plane in some]
    return torch.from_numpy(np.stack(filters)).float()


def codes(images_nHW3: np.ndarray) -> np.ndarray:
    """int32 (n, h, w): the code of each window, NO_CODE for one with little contrast."""
    filters = _filters()
    powers = (2.0 ** torch.arange(len(filters)))[None, :, None, None]  # sums of 24 of them are exact in float32
    parts = []
    for part in torch.from_numpy(images_nHW3).split(_IMAGES):
        pixels = part.permute(0, 3, 1, 2).float() - 127.5
        code = F.conv2d((F.conv2d(pixels, filters) > 0).float(), powers)[:, 0].int()
        mean, square = (F.avg_pool2d(x, SIDE, 1) for x in (pixels, pixels.square()))
        code[(square - mean.square()).mean(1) < _CONTRAST**2] = NO_CODE
        parts.append(code)
    return torch.cat(parts).numpy()
