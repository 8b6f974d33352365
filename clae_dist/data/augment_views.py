"""Augment the views of a loaded batch in the way that suits the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from clae_dist.config import Augment
from clae_dist.data.augment import augment
from clae_dist.data.augment_batched import augment_batched


def augment_views(
    views_Vn3SS: torch.Tensor,
    draws_VnA: torch.Tensor,
    settings: Sequence[Augment | None],
    device: torch.device,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Return V times (n, 3, S, S) in [0, 1] on `device`, of uint8 views. A view without settings stays as it is.

    The CPU computes only the operations that an image needs; other devices compute all views at once, in few kernels.
    """
    if device.type != "cpu":
        bare = replace(Augment().weakened(0.0), flip=0.0)
        views_Vn3SS = views_Vn3SS.to(device, non_blocking=True)
        return [*augment_batched(views_Vn3SS, draws_VnA, [one or bare for one in settings]).to(dtype)]
    planar = (
        view.contiguous().float() / 255 for view in views_Vn3SS
    )  # operations a channel are half as fast on interleaved ones
    images = zip(planar, draws_VnA, settings, strict=True)
    return [(x if one is None else augment(x, draws, one)).to(dtype) for x, draws, one in images]
