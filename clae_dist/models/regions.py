"""Features of regions of an image, from the map that the encoder pools.

# B images, L regions of an image, F feature width, M side of the map. Boxes are left, top, right, bottom, as shares of a side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from clae_dist.errors import ConfigError

_BINS = 2  # a region is the mean of so many by so many parts, as in the public code of DSCL


def feature_map(encoder: nn.Module, feature_dim: int, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The last map (B, F, M, M) that a part of the encoder returns in `forward`.

    Raises ConfigError for an encoder whose features are not the mean of such a map.
    """
    maps: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.dim() == 4 and output.shape[1] == feature_dim:
            maps.append(output)

    hooks = [part.register_forward_hook(keep) for part in encoder.children()]
    try:
        features_BF = forward()
    finally:
        for hook in hooks:
            hook.remove()
    found = next((one for one in reversed(maps) if one.shape[-1] > 1), maps[-1] if maps else None)  # the last may be pooled
    if found is None or not _near(found.mean((2, 3)), features_BF):
        raise ConfigError(
            "model.encoder returns no mean of a map of features, of which method.patches needs regions; use a ResNet, or "
            "method.patches=0."
        )
    return found


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the rounding of half precision; always so without data, on torch's meta device."""
    return a.is_meta or bool((a - b).float().norm() <= 0.05 * b.float().norm())


def region_features(map_BFMM: torch.Tensor, boxes_BL4: torch.Tensor) -> torch.Tensor:
    """(B L, F): each region's mean, by bilinear interpolation. Reference: He et al. 2017, Mask R-CNN, section 3 (RoIAlign)."""
    return aligned(map_BFMM, boxes_BL4, _BINS).mean((2, 3))


def aligned(images_BCSS: torch.Tensor, boxes_BL4: torch.Tensor, size: int) -> torch.Tensor:
    """(B L, C, size, size): the regions, resized by averages of bilinear samples."""
    from torchvision.ops import roi_align

    images = images_BCSS if images_BCSS.dtype == torch.float64 else images_BCSS.float()
    boxes = [*(boxes_BL4 * images.shape[-1]).to(images.dtype)]
    return roi_align(images, boxes, size, aligned=True)
