"""ConsoleTracker: a run as aligned lines of text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from clae_dist.tracking.tracker import Status


class ConsoleTracker:
    """Writes a line for metrics that hold a loss, and one for a kNN accuracy.

    step   120/1560  epoch  2.31  loss 5.1234 (clean 5.0123, adversarial 5.2345)  512 images/s  data  3 %  attack 37 %  …
    """

    def __init__(self, stream: IO[str], total_steps: int, global_size: int) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._total_images = total_steps * global_size

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        for parts in (self._training(metrics, images_seen), _evaluation(metrics)):
            if parts:
                self._write("  ".join([*self._place(metrics), *parts]))

    def log_artifacts(self, path: Path, name: str) -> None:
        pass

    def log_model(self, export_folder: Path, digest: str) -> None:
        pass

    def close(self, status: Status) -> None:
        pass

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def _place(self, metrics: Mapping[str, float]) -> list[str]:
        width = len(str(self._total_steps))
        parts = [f"step {metrics['step']:>{width}.0f}/{self._total_steps}"] if "step" in metrics else []
        return parts + ([f"epoch {metrics['epoch']:6.2f}"] if "epoch" in metrics else [])

    def _training(self, metrics: Mapping[str, float], images_seen: int) -> list[str]:
        if "loss" not in metrics:
            return []
        loss = f"loss {metrics['loss']:.4f}"
        if "loss_clean" in metrics and "loss_adversarial" in metrics:
            loss += f" (clean {metrics['loss_clean']:.4f}, adversarial {metrics['loss_adversarial']:.4f})"
        parts = [loss]
        speed = metrics.get("images_per_s", 0.0)
        if speed > 0:
            parts.append(f"{speed:6.0f} images/s")
        parts += [f"{word} {metrics[key]:3.0f} %" for word, key in SHARES if key in metrics]
        if metrics.get("bad_samples"):
            parts.append(f"{metrics['bad_samples']:.0f} bad samples")
        if "learning_rate" in metrics:
            parts.append(f"lr {metrics['learning_rate']:.3g}".ljust(len("lr 0.00123")))
        if speed > 0 and math.isfinite(speed):
            parts.append(f"left {duration(max(0, self._total_images - images_seen) / speed)}")
        return parts


SHARES = (("data wait", "data_wait_share"), ("attack", "attack_share"))


def _evaluation(metrics: Mapping[str, float]) -> list[str]:
    if "knn_accuracy" not in metrics:
        return []
    ends = [metrics[key] for key in ("knn_accuracy_low", "knn_accuracy_high") if key in metrics]
    interval = f" (95 % interval {ends[0]:.1f} – {ends[1]:.1f})" if len(ends) == 2 else ""
    return [f"kNN accuracy {metrics['knn_accuracy']:.2f} %{interval}"]


def duration(seconds: float) -> str:
    """3:07, 2:03:07 or 4 d 02:03:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes}:{rest:02d}"
    if hours < 24:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{hours // 24} d {hours % 24:02d}:{minutes:02d}:{rest:02d}"
