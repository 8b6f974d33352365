"""The augmentation of each rank's device, compared with that of the CPU in float64.

# n images of S pixels a side, A draws of an image.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from clae_dist.config import Augment
from clae_dist.data.augment import AUGMENT_DRAWS, ORDER, augment
from clae_dist.data.augment_views import augment_views, augmentation_of
from clae_dist.verify.check import Subject, Verdict
from clae_dist.world import World

_BOUND = 1e-4  # of pixels in [0, 1] in float32; any wrong operation changes pixels by more than 1e-2
_ORDERS = 24  # of brightness, contrast, saturation and hue
_SIDES = (20, 33)  # beside the recipe's: images smaller than a tile of the kernels, and hardly larger


def check(subject: Subject, world: World) -> Verdict:
    """Flip, jitter in every order, grey and blur with the recipe's strengths, at several sizes. Collective."""
    config = subject.recipe.config
    settings = replace(config.augment, flip=0.5, jitter=0.9, grey=0.3, blur=0.5)
    sides = dict.fromkeys((*_SIDES, config.data.image_size))
    differences = {str(side): world.largest(_difference(settings, side, world)) for side in sides}
    problems = [
        f"images of {side} pixels differ by up to {value:.1e}" for side, value in differences.items() if not value <= _BOUND
    ]
    path = augmentation_of(world.device).__name__
    return Verdict.of(problems, f"{path}: {max(differences.values()):.1e}", path=path, differences=differences)


def _difference(settings: Augment, side: int, world: World) -> float:
    """The largest difference of a pixel on this rank, whose images and draws are its own."""
    draw = torch.Generator().manual_seed(world.rank)
    images_n3SS = torch.randint(0, 256, (_ORDERS, side, side, 3), generator=draw, dtype=torch.uint8).permute(0, 3, 1, 2)
    draws_nA = torch.rand(_ORDERS, AUGMENT_DRAWS, generator=draw).clamp_max(1 - 2**-24)
    draws_nA[:, ORDER] = (torch.arange(_ORDERS) + 0.5) / _ORDERS
    expected = augment(images_n3SS.contiguous().double() / 255, draws_nA.double(), settings)
    (augmented,) = augment_views(images_n3SS[None], draws_nA[None], [settings], world.device, torch.float32)
    return float((augmented.cpu() - expected).abs().max())
