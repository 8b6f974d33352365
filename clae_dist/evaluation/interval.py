"""Confidence intervals of accuracies: the sampling error of a share of n images."""

from __future__ import annotations

import math

Z_95 = 1.959964  # two-sided 95 % of the normal distribution


def wilson_interval(percent: float, num_images: int) -> tuple[float, float]:
    """The 95 % confidence interval, in percent, of an accuracy of `percent` measured on `num_images` independent images.

    It covers the choice of the test images alone, not the seed of the run. Reference: Wilson 1927; within [0, 100], and
    right near both ends.
    """
    assert num_images > 0
    share, z2 = percent / 100, Z_95**2
    middle = (share + z2 / (2 * num_images)) / (1 + z2 / num_images)
    half = Z_95 / (1 + z2 / num_images) * math.sqrt(share * (1 - share) / num_images + z2 / (4 * num_images**2))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def accuracy_metrics(percent: float, num_images: int) -> dict[str, float]:
    """An accuracy on `num_images` images and its 95 % interval, as metrics of a protocol."""
    low, high = wilson_interval(percent, num_images)
    return {"accuracy": percent, "accuracy_low": round(low, 3), "accuracy_high": round(high, 3)}


def interval_text(interval: tuple[float, float] | list[float] | None) -> str:
    """ "40.8 – 42.8", or a dash without one."""
    return "–" if interval is None else f"{interval[0]:.1f} – {interval[1]:.1f}"
