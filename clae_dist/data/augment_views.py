"""Augment the views of a loaded batch in the way that suits the device."""

from __future__ import annotations

import functools
import subprocess
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from clae_dist.config import Augment
from clae_dist.data.augment import augment
from clae_dist.data.augment_batched import augment_batched

_TRITON_CAPABILITY = (7, 0)


def augment_views(
    views_Vn3SS: torch.Tensor,
    draws_VnA: torch.Tensor,
    settings: Sequence[Augment | None],
    device: torch.device,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Return V times (n, 3, S, S) in [0, 1] on `device`, of uint8 views. A view without settings stays as it is.

    The CPU computes only the operations that an image needs. GPUs compute all views at once: in two Triton kernels, or in few
    kernels of torch's where Triton does not run.
    """
    if device.type != "cpu":
        bare = replace(Augment().weakened(0.0), flip=0.0)
        views_Vn3SS = views_Vn3SS.to(device, non_blocking=True)
        return [*augmentation_of(device)(views_Vn3SS, draws_VnA, [one or bare for one in settings]).to(dtype)]
    planar = (
        view.contiguous().float() / 255 for view in views_Vn3SS
    )  # operations a channel are half as fast on interleaved ones
    images = zip(planar, draws_VnA, settings, strict=True)
    return [(x if one is None else augment(x, draws, one)).to(dtype) for x, draws, one in images]


@functools.cache
def augmentation_of(device: torch.device) -> Callable[..., torch.Tensor]:
    """The fastest augmentation that runs on this device: of all views at once, except on CPUs."""
    if device.type == "cpu":
        return augment
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _TRITON_CAPABILITY:
        return augment_batched
    try:
        import triton

        triton.runtime.driver.active.get_current_target()  # compiles a part of Triton, for which it needs a C compiler
    except (ImportError, RuntimeError, AssertionError, OSError, subprocess.SubprocessError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"Triton does not start, so that augmentation takes more kernels: {reason}", RuntimeWarning, stacklevel=2)
        return augment_batched
    from clae_dist.data.augment_triton import augment_fused

    return augment_fused
