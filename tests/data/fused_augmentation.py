"""Facts about the Triton kernels on CPU tensors, as JSON: `TRITON_INTERPRET=1 python -m tests.data.fused_augmentation`.

Triton interprets all kernels of a process or none, so this is a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from triton.runtime.interpreter import InterpreterBuilder

from clae_dist.config import Augment
from clae_dist.data import augment_triton
from clae_dist.data.augment import AUGMENT_DRAWS, BLUR, FLIP, JITTER, augment
from clae_dist.data.augment_triton import augment_fused
from tests.data.test_augment_batched import NOTHING, STRONG, every_choice, images


def difference(draws: torch.Tensor, settings: Augment, side: int, views: torch.Tensor | None = None) -> float:
    """The largest difference from augment.augment in float64."""
    views = images(draws, side) if views is None else views
    expected = augment(views[0].contiguous().double() / 255, draws[0].double(), settings)
    return float((augment_fused(views, draws, [settings])[0] - expected).abs().max())


def wide(strength: float) -> Augment:
    return replace(STRONG, brightness=strength, contrast=strength, saturation=strength)


def zero_factors() -> torch.Tensor:
    draws = every_choice()[:, 9::16]
    draws[:, :, 3:6] = 0.0  # black, the mean, and grey
    draws[:, :, JITTER] = 0.0
    return draws


def several_views() -> float:
    draws = torch.rand(3, 4, AUGMENT_DRAWS, generator=torch.Generator().manual_seed(2)) * 0.999
    each = (STRONG, Augment().weakened(0.0), NOTHING)
    views = images(draws)
    together = augment_fused(views, draws, each)
    alone = [augment_fused(views[view : view + 1], draws[view : view + 1], [one])[0] for view, one in enumerate(each)]
    return float((together - torch.stack(alone)).abs().max())


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Bytes of unmasked elements that kernels load and store: every load counts, also of pixels that a cache still holds."""
    counts = {"loaded": 0, "stored": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, pointers, mask, *rest):  # type: ignore[no-untyped-def]
        loaded = load(self, pointers, mask, *rest)
        counts["loaded"] += int(mask.data.sum()) * loaded.data.itemsize
        return loaded

    def counted_store(self, pointers, value, mask, *rest):  # type: ignore[no-untyped-def]
        counts["stored"] += int(mask.data.sum()) * value.data.itemsize
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counted_load, counted_store
    try:
        yield counts
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def times_read_and_written_once(side: int) -> dict[str, float]:
    """Bytes that kernels load and store beside those of reading uint8 and writing float32 once, by kind of image."""
    found = {}
    for name, jittered, blurred in (("plain", 0, 0), ("jittered", 1, 0), ("jittered and blurred", 1, 1)):
        draws = every_choice()[:, :1]
        draws[..., FLIP], draws[..., JITTER], draws[..., BLUR] = 0.01, 0.99 - 0.98 * jittered, 0.99 - 0.98 * blurred
        views = images(draws, side)
        with counting() as counts:
            augment_fused(views, draws, [STRONG])
        found[name] = (counts["loaded"] + counts["stored"]) / (5 * views.numel())
    return found


def mean_of_the_unchanged_image(draws: torch.Tensor) -> float:
    """The difference of a wrong kernel: contrast with the mean grey that the image has before every operation."""
    parameters = augment_triton._parameters

    def without_turns(draws: torch.Tensor, settings: Augment) -> torch.Tensor:
        columns = parameters(draws, settings)
        columns[:, augment_triton._TURN.value] = 0
        return columns

    augment_triton._parameters = without_turns
    try:
        return difference(draws, STRONG, 20)
    finally:
        augment_triton._parameters = parameters


def facts(thorough: bool) -> dict[str, object]:
    step = 8 if thorough else 32
    draws, few = every_choice(), every_choice()[:, [5, 230, 767]]
    return {
        "largest differences": {
            "orders": difference(draws[:, step - 2 :: step], STRONG, 20),
            "wide": max(difference(draws[:, 15 :: 2 * step], wide(strength), 20) for strength in (1.0, 1.7)),
            "zero factors": difference(zero_factors()[:, :: step // 8], wide(1.0), 20),
            "tiles": max(difference(few, STRONG, side) for side in ((3, 31, 32, 33, 65) if thorough else (3, 33))),
            "radius 17": difference(few[:, -1:], STRONG, 340) if thorough else 0.0,  # the surroundings have 128 columns
            "planar": difference(few, STRONG, 20, images(few).contiguous()),
            "several views": several_views(),
        },
        "mean of the unchanged image": mean_of_the_unchanged_image(draws[:, 30::64]),
        "bytes": times_read_and_written_once(224 if thorough else 64),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(facts(sys.argv[1:] == ["thorough"])))
