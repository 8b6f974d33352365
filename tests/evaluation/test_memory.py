"""Features of sets that are larger than memory: they are on disk, a batch at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from clae_dist.config import Config, Evaluation
from clae_dist.data.evaluation_set import Views
from clae_dist.evaluation.place import Place
from clae_dist.world import World

WIDTH, IMAGES, BATCH = 2048, 16_000, 500


class _Model(torch.nn.Module):
    evaluated_route = "clean"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :1].expand(-1, WIDTH).contiguous()


class _Images:
    split = "train"
    ids = np.arange(IMAGES)

    def __len__(self) -> int:
        return IMAGES

    def lists(self, ids: Sequence[np.ndarray]) -> Iterator[Views]:
        for positions in ids:
            images = torch.from_numpy(positions % 251).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
            yield Views(images, torch.zeros(len(images), dtype=torch.int64), torch.from_numpy(positions), {})


def _anonymous_mb() -> float:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def test_features_take_the_memory_of_a_batch(tmp_path: Path) -> None:
    """131 MB of features of one encoder, of which never more than a few batches (4 MB each) are in memory."""
    config = replace(Config(), evaluation=Evaluation(batch_size=BATCH))
    manifest: Any = SimpleNamespace(digest="d")
    place = Place(World.single("cpu"), tmp_path, config, manifest, lambda _: None)
    model: Any = _Model()
    images: Any = _Images()
    before, most, stop = _anonymous_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            most[0] = max(most[0], _anonymous_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        found = place.features({"after": model}, images, "features")["after"]
        rows = found.features_NF[::1000, 5]
    finally:
        stop.set()
        thread.join()
    assert found.features_NF.shape == (IMAGES, WIDTH)
    torch.testing.assert_close(rows, (torch.arange(0, IMAGES, 1000) % 251).float() / 255)
    assert most[0] - before < 60
    assert sum(path.stat().st_size for path in tmp_path.rglob("features.npy")) > 130e6
    assert not list(tmp_path.rglob("*.part"))
