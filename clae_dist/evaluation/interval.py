"""Confidence intervals: of an accuracy, for the choice of n images; of a mean over seeds, for the choice of the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

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


class Mean(NamedTuple):
    """A mean over n runs and half the width of its 95 % confidence interval; None for a single run."""

    value: float
    half: float | None
    num: int

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.half is None else (self.value - self.half, self.value + self.half)


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of values and its 95 % confidence interval by Student's t with n - 1 degrees of freedom.

    The interval holds for normally distributed values of independent seeds.
    """
    assert values
    if len(values) < 2:
        return Mean(values[0], None, 1)
    half = student_t(0.95, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Mean(statistics.fmean(values), half, len(values))


def student_t(level: float, degrees: int) -> float:
    """The t such that a Student variable of so many degrees of freedom is within ± t with probability `level`.

    Reference: Abramowitz & Stegun 1964, 26.7.3 and 26.7.4: closed forms for integer degrees of freedom.
    """
    assert 0 < level < 1
    assert degrees >= 1
    low, high = 0.0, 1.0
    while _within(high, degrees) < level:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """The probability that |T| <= t."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = 0.0
    for k in range((degrees - odd) // 2):  # even: 1, 1/2 c², (1·3)/(2·4) c⁴ …; odd: c, 2/3 c³, (2·4)/(3·5) c⁵ …
        term = (
            (cosine if odd else 1.0) if k == 0 else term * cosine**2 * ((2 * k) / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
        )
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
