"""Launches and host waits of a training step on a real GPU, as torch's profiler sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

from clae_dist.bench.step import one_step
from clae_dist.bench.steps import Kind, make_images, prepare, variants
from clae_dist.devices import local_device

_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")  # and their variants
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_WARM_UP = 3


def launches(encoder: str, images: int, image_size: int) -> Iterator[tuple[str, float, str, float | None, str]]:
    """The fields of a CountRow for each count."""
    kind = Kind(encoder, encoder, image_size, images, "bfloat16")
    device = local_device()
    take_step = one_step(prepare(kind, variants(kind)["exact"], device), make_images(kind, device))
    for _ in range(_WARM_UP):
        take_step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        take_step()
    calls = [str(event.name) for event in _events(profiler)]
    how = f"torch.profiler, CLAE exact, {kind.title()}, one rank, without augmentation"
    yield "on this GPU: launches of a step", sum(name.startswith(_LAUNCHES) for name in calls), "kernels", None, how
    how += "; one of them may be the profiler's, which waits when it stops"
    yield "on this GPU: host waits of a step", sum(name in _WAITS for name in calls), "waits", 2, how


def _events(profiler: Any) -> Any:
    return profiler.events() or []
