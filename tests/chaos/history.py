"""Which images the surviving history of a run consumed, from what its ranks wrote down (recorder/sitecustomize.py)."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any


def records(folder: Path) -> list[dict[str, Any]]:
    """All whole lines, in the order of time. A killed process may leave half a line: that batch was never trained on."""
    found = []
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return sorted(found, key=lambda record: record["time"])


def surviving_steps(found: list[dict[str, Any]]) -> dict[int, list[int]]:
    """Step -> the images that all ranks together took in its last execution, the one that later steps were built on.

    Raises AssertionError for a step whose last execution lacks a rank.
    """
    last: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
    for record in found:
        ranks = last[record["step"]]
        if any(other["size"] != record["size"] for other in ranks.values()):
            ranks.clear()  # the run went on with another number of ranks: what they took counts
        ranks[record["rank"]] = record
    images = {}
    for step, ranks in sorted(last.items()):
        size = next(iter(ranks.values()))["size"]
        assert sorted(ranks) == list(range(size)), f"step {step}: ranks {sorted(ranks)} of {size} took images"
        images[step] = [image for rank in range(size) for image in ranks[rank]["ids"]]
    return images


def assert_exactly_once(images: dict[int, list[int]], num_steps: int, steps_per_epoch: int, global_size: int) -> None:
    """Steps 0 … num_steps - 1 took global_size images each, and none twice within an epoch."""
    assert sorted(images) == list(range(num_steps)), f"steps {sorted(set(range(num_steps)) ^ set(images))[:10]} differ"
    for step, taken in images.items():
        assert len(taken) == global_size, (step, len(taken))
    for epoch in range(-(-num_steps // steps_per_epoch)):
        steps = range(epoch * steps_per_epoch, min(num_steps, (epoch + 1) * steps_per_epoch))
        twice = [image for image, count in Counter(i for step in steps for i in images[step]).items() if count > 1]
        assert not twice, f"epoch {epoch}: images {twice[:10]} were taken twice"
