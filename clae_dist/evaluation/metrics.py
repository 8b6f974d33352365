"""Reader of metrics.jsonl for the report, in bounded memory: a curve keeps a few thousand points."""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_left
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from clae_dist.reading import ReadError, parse_line, raw_lines

MOST_LINES = 50_000  # of training, up to which all are read
_MOST_SINCE = 10_000
MOST_POINTS = 4096  # of a curve; a picture of it has some hundred columns of pixels
_LARGEST = 1e30  # value in a chart
_MOST_IMAGES = 2**53
_MOST_KEYS = 200  # a run logs some thirty
_NOT_DRAWN = ("images_seen", "step", "epoch", "time_s")


class Curve:
    """Values over images seen, in ascending order. When there are too many, half of the points are dropped.

    Of every four, `extremes` keeps the lowest and the highest, so that no spike is lost; otherwise every second one is kept,
    which preserves the distribution.
    """

    def __init__(self, *, extremes: bool = True) -> None:
        self.x, self.y = array("d"), array("d")
        self._extremes = extremes
        self._stride, self._skipped = 1, 0

    def add(self, x: float, y: float) -> None:
        """Append a point; one at the last x replaces the last point."""
        if self.x and self.x[-1] == x:
            self.y[-1] = y
            return
        if not self._extremes:
            self._skipped += 1
            if self._skipped < self._stride:
                return
            self._skipped = 0
        self.x.append(x)
        self.y.append(y)
        if len(self.x) >= 2 * MOST_POINTS:
            self._thin()

    def cut(self, x: float) -> None:
        """Remove the points from `x` on: the run was restarted before them."""
        end = bisect_left(self.x, x)
        del self.x[end:], self.y[end:]

    def _thin(self) -> None:
        x, y = np.array(self.x), np.array(self.y)  # their number is a multiple of four
        kept = np.arange(0, len(x), 2)
        if self._extremes:
            fours = np.nan_to_num(y, nan=-math.inf).reshape(-1, 4)
            pairs = np.sort(np.stack([fours.argmin(1), 3 - fours[:, ::-1].argmax(1)], 1), 1)  # two different ones
            kept = (4 * np.arange(len(fours))[:, None] + pairs).ravel()
        else:
            self._stride *= 2
        self.x, self.y = array("d", x[kept].tobytes()), array("d", y[kept].tobytes())


class Metrics:
    """Curves of the logged keys. Memory does not grow with the length of the run."""

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.rates = Curve(extremes=False)  # images per second, for their median
        self.images_seen: int | None = None  # of the last line
        self.train_s: float | None = None  # the most; time_s counts on over restarts
        self.ignored = 0  # lines that are cut off or damaged

    def add(self, line: dict[str, Any] | None) -> None:
        """Add a line. A restarted run repeats some lines; from the first repeated one on, the later lines count."""
        seen = None if line is None else line.get("images_seen")
        if line is None or type(seen) is not int or not 0 <= seen < _MOST_IMAGES:
            self.ignored += 1
            return
        if self.images_seen is not None and seen < self.images_seen:
            for drawn in (*self.curves.values(), self.rates):
                drawn.cut(seen)
        self.images_seen = seen
        for key, value in line.items():
            if type(value) in (int, float) and key not in _NOT_DRAWN:
                curve = self.curves.get(key)
                if curve is None:
                    if len(self.curves) >= _MOST_KEYS:
                        continue
                    curve = self.curves[key] = Curve()
                curve.add(seen, value if -_LARGEST < value < _LARGEST else math.nan)
        rate: Any = line.get("images_per_s")
        time_s: Any = line.get("time_s")
        if type(rate) in (int, float) and 0 < rate < _LARGEST:
            self.rates.add(seen, rate)
        if type(time_s) in (int, float) and 0 <= time_s < _LARGEST:
            self.train_s = max(self.train_s or 0.0, time_s)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Images seen and values, where `key` was logged."""
        curve = self.curves.get(key)
        return (list(curve.x), list(curve.y)) if curve else ([], [])

    def last(self, key: str) -> float | None:
        """The last value of `key`; None without one, and for NaN."""
        values = self.series(key)[1]
        return values[-1] if values and not math.isnan(values[-1]) else None


def read_metrics(path: Path) -> tuple[Metrics, list[str]]:
    """The metrics in a file, and sentences about its unused lines. The last line may be cut off.

    Of more than MOST_LINES lines of training, a random part is used, the same for the same file; of others (kNN, goodput) all.
    """
    metrics, notes = Metrics(), list[str]()
    draw, one_in, since = random.Random(0), _one_in(path), list[bytes]()
    line = b"\n"
    try:
        for line in raw_lines(path):
            other = b'"loss"' not in line
            if one_in == 1 or other or draw.random() * one_in < 1 or len(since) > _MOST_SINCE:
                if other and since:
                    metrics.add(parse_line(since[-1]))
                since.clear()
                metrics.add(parse_line(line))
            elif line.startswith(b"{") and line.endswith(b"}\n"):
                since.append(line)
            else:
                metrics.add(None)
        for left in since:  # all lines at the end of the file are read
            metrics.add(parse_line(left))
    except ReadError as error:
        notes.append(f"{path} cannot be read ({error}): its metrics are ignored.")
    ignored = metrics.ignored - (not line.endswith(b"\n"))
    if ignored:
        notes.append(f"{path}: {ignored:,} lines that are cut off or damaged are ignored.")
    if one_in > 1:
        notes.append(f"{path}: one in {one_in} of its lines of training is used, as there are more than {MOST_LINES:,}.")
    return metrics, notes


def _one_in(path: Path) -> int:
    """The n of "one in n lines is read", estimated by the length of the first lines."""
    first = list(islice(raw_lines(path), 100))
    if len(first) < 100:
        return 1
    return max(1, path.stat().st_size * len(first) // (MOST_LINES * sum(map(len, first))))
