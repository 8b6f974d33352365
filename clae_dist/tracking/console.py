"""Console output of a run as aligned lines of text, usually at most 100 characters; `read_line` parses them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

from clae_dist.progress import duration
from clae_dist.tracking.tracker import Tracker

STARTING = "starting: "  # prefix of lines about the time before the first step
WAITING = 5  # percent of the time waiting for data, above which a line shows it
_LINE = re.compile(
    r"step +(?P<step>\d+)/(?P<total>\d+)(  epoch +[\d.]+)?  "
    r"((?P<loss>loss [^ ]+( \([^)]*\))?)(  +(?P<speed>[\d,]+ images/s))?.*?(  (?P<left>left [\w :]+))?|(?P<note>kNN .*))$"
)


@dataclass(frozen=True)
class StepLine:
    """The content of a line of ConsoleTracker; texts are "" if the line has none."""

    step: int
    total: int
    loss: str
    speed: str
    left: str
    note: str  # a kNN accuracy


def read_line(line: str) -> StepLine | None:
    """Parse a line that ConsoleTracker wrote; None for any other line."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    texts = {name: match[name] or "" for name in ("loss", "speed", "left", "note")}
    return StepLine(int(match["step"]), int(match["total"]), **texts)


class ConsoleTracker(Tracker):
    """Prints a line for metrics with a loss, and one for a kNN accuracy.

    step  120/1560  epoch  2.31  loss 5.123 (clean 5.012, attacked 5.235)     512 images/s  left 11:59

    Learning rate, shares of the time and the rest are in metrics.jsonl and on MLflow's page.
    """

    def __init__(self, stream: IO[str], total_steps: int, global_size: int) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._total_images = total_steps * global_size

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        for parts in (self._training(metrics, images_seen), _evaluation(metrics)):
            if parts:
                self._write("  ".join([*self._place(metrics), *parts]))

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def _place(self, metrics: Mapping[str, float]) -> list[str]:
        width = len(str(self._total_steps))
        parts = [f"step {metrics['step']:>{width}.0f}/{self._total_steps}"] if "step" in metrics else []
        return parts + ([f"epoch {metrics['epoch']:5.2f}"] if "epoch" in metrics else [])

    def _training(self, metrics: Mapping[str, float], images_seen: int) -> list[str]:
        if "loss" not in metrics:
            return []
        loss = f"loss {metrics['loss']:.3f}"
        if "loss_clean" in metrics and "loss_adversarial" in metrics:
            loss += f" (clean {metrics['loss_clean']:.3f}, attacked {metrics['loss_adversarial']:.3f})"
        parts = [loss]
        speed = metrics.get("images_per_s", 0.0)
        if speed > 0:
            parts.append(f"{speed:6,.0f} images/s")
        if "mfu" in metrics:
            parts.append(f"MFU {metrics['mfu']:.0f} %")
        if metrics.get("data_wait_share", 0.0) > WAITING:
            parts.append(f"data wait {metrics['data_wait_share']:.0f} %")
        if metrics.get("bad_samples"):
            parts.append(f"{metrics['bad_samples']:.0f} bad samples")
        if speed > 0 and math.isfinite(speed):
            parts.append(f"left {duration(max(0, self._total_images - images_seen) / speed)}")
        return parts


_ACCURACIES = {
    "knn_accuracy": "kNN accuracy",
    "linear_accuracy": "linear probe accuracy",
    "accuracy": "accuracy",
    "accuracy_many": "of classes with many images",
    "accuracy_medium": "medium",
    "accuracy_few": "few",
    "target_accuracy": "target accuracy",
}


def _evaluation(metrics: Mapping[str, float]) -> list[str]:
    parts = []
    for key, title in _ACCURACIES.items():
        if key in metrics:
            ends = [metrics[end] for end in (f"{key}_low", f"{key}_high") if end in metrics]
            interval = f" (95 % interval {ends[0]:.1f} – {ends[1]:.1f})" if len(ends) == 2 else ""
            parts.append(f"{title} {metrics[key]:.2f} %{interval}")
    if "domain_distance" in metrics:
        parts.append(f"distance of the domains {metrics['domain_distance']:.2f}")
    return parts
