"""Profile of one part: sizes, modes and classes, and oddities among them."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_prep.audit.scan import MODES

TINY = 32  # pixels of the short side: below it a crop holds next to nothing
EXTREME_RATIO = 4.0  # long side to short side: a square crop sees at most a quarter
OUTLIER = 10.0  # times the pixels of the median image, or a tenth of them


def profile(rows: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """Numbers of one part's rows (ROW), as JSON holds them. "odd" counts images; an image may be odd in several ways."""
    seen = rows[rows["width"] > 0]
    modes = np.bincount(seen["mode"], minlength=len(MODES))
    facts: dict[str, Any] = {
        "images": len(rows),
        "unreadable": len(rows) - len(seen),
        "modes": {name: int(count) for name, count in zip(MODES, modes, strict=True) if count},
        "classes": _classes(rows["label"], classes),
        "size": None,
        "odd": {name: int(found.sum()) for name, found in oddities(seen).items()},
    }
    if len(seen):
        pixels = seen["width"].astype(np.int64) * seen["height"]
        facts["size"] = {
            name: [int(seen["width"][at]), int(seen["height"][at])]
            for name, at in (("smallest", pixels.argmin()), ("median", _median(pixels)), ("largest", pixels.argmax()))
        }
    return facts


def oddities(seen: np.ndarray) -> dict[str, np.ndarray]:
    """bool for each of the decoded rows, by what is odd."""
    if not len(seen):
        return {}
    width, height = seen["width"].astype(np.float64), seen["height"].astype(np.float64)
    short, long, pixels = np.minimum(width, height), np.maximum(width, height), width * height
    typical = pixels[_median(pixels)]
    return {
        f"short side below {TINY} pixels": short < TINY,
        f"longer than {EXTREME_RATIO:g} times their short side": long > EXTREME_RATIO * short,
        f"over {OUTLIER:g} times the pixels of the median image": pixels > OUTLIER * typical,
        f"under 1/{OUTLIER:g} of the pixels of the median image": pixels * OUTLIER < typical,
        "of (almost) one colour": ~seen["has_hash"],
    }


def _median(values: np.ndarray) -> int:
    return int(np.argpartition(values, len(values) // 2)[len(values) // 2])


def _classes(labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """Images of the largest and the smallest class that has any, and the classes without."""
    named = labels[(labels >= 0) & (labels < len(classes))]
    counts = np.bincount(named, minlength=len(classes))
    facts: dict[str, Any] = {"number": len(classes), "unlabelled": len(labels) - len(named), "empty": []}
    if len(named):
        large, small = int(counts.argmax()), int(np.where(counts, counts, len(named) + 1).argmin())
        facts["largest"] = [classes[large], int(counts[large])]
        facts["smallest"] = [classes[small], int(counts[small])]
        facts["imbalance"] = round(int(counts[large]) / int(counts[small]), 2)
        facts["empty"] = [classes[label] for label in np.flatnonzero(counts == 0).tolist()]
    return facts
