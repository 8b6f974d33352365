"""Minutes of tests per folder: the table at the end of a session, and the budget of the default part.

A duration is the time of a test with its fixtures, added up over the workers of pytest-xdist: with two of them the session
takes about half of the sum. Budgets are minutes of a machine on which `measure_speed` gives 1.0, and scale with it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import torch

_MINUTES = {  # of the default part; tests directly in tests/ are "."
    ".": 1.0,
    "bench": 0.4,
    "chaos": 0.1,
    "contrast": 0.4,
    "data": 0.9,
    "data_prep": 0.7,
    "downstream": 0.4,
    "evaluation": 1.2,
    "golden": 0.1,
    "hosts": 0.1,
    "launch": 0.2,
    "launchers": 0.6,
    "methods": 0.5,
    "models": 0.2,
    "monitoring": 0.1,
    "null_gpu": 0.1,
    "parallel": 1.0,
    "parity": 0.4,
    "planner": 0.2,
    "runs": 0.6,
    "studies": 0.2,
    "tracking": 0.3,
    "training": 1.1,
    "verify": 0.3,
}
_REFERENCE_S = 0.025  # what measure_speed's work takes on the machine of the budgets
_TOLERANCE = 1.5


def measure_speed() -> float:
    """Time of a fixed piece of work relative to the reference machine: 2.0 is half as fast. The best of five counts.

    At least 1.0: disks and process starts of a faster machine are not faster.
    """
    taken_s = []
    matrix = torch.ones(256, 256)
    for _ in range(5):
        begin = time.perf_counter()
        sum(i * i for i in range(500_000))
        for _ in range(20):
            matrix = (matrix @ matrix).clamp_(max=1.0)
        taken_s.append(time.perf_counter() - begin)
    return max(1.0, min(taken_s) / _REFERENCE_S)


def _seconds(stats: Mapping[str, Iterable[Any]]) -> tuple[Counter[str], Counter[str]]:
    """Durations per folder of the default part and of slow, long and chaos tests."""
    default, other = Counter[str](), Counter[str]()
    for reports in stats.values():
        for report in reports:
            if hasattr(report, "duration") and hasattr(report, "keywords"):
                part = other if {"slow", "long", "chaos"} & set(report.keywords) else default
                part[_folder(report.nodeid)] += report.duration
    return default, other


def _folder(node_id: str) -> str:
    parts = PurePath(node_id.partition("::")[0]).parts
    return parts[1] if len(parts) > 2 else "."


def _limit_s(speed: float) -> float:
    return 60 * sum(_MINUTES.values()) * speed


def is_exceeded(stats: Mapping[str, Iterable[Any]], speed: float) -> bool:
    return sum(_seconds(stats)[0].values()) > _TOLERANCE * _limit_s(speed)


def table(stats: Mapping[str, Iterable[Any]], speed: float) -> list[str]:
    """Lines: a folder each, the longest first; nothing for less than a minute of tests."""
    default, other = _seconds(stats)
    if sum((default + other).values()) < 60:
        return []
    lines = [f"{'minutes of tests':20} {'default':>8} {'budget':>8} {'slow':>8}   (this machine: {speed:.2f} of the reference)"]
    for name, _ in (default + other).most_common():
        limit = _MINUTES.get(name, 0.0) * speed
        lines.append(f"{name:20} {default[name] / 60:8.2f} {limit:8.2f} {other[name] / 60:8.2f}")
    lines.append(f"{'all':20} {sum(default.values()) / 60:8.2f} {_limit_s(speed) / 60:8.2f} {sum(other.values()) / 60:8.2f}")
    if is_exceeded(stats, speed):
        lines.append(f"The default part takes more than {_TOLERANCE:g} times its budget: make tests faster, or mark them slow.")
    return lines
