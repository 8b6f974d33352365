"""The first images of a set, on which `clae bench data` measures.

# n images of a chunk, S side of a view
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from clae_dist.config import Batch, Config, Data
from clae_dist.cores import usable_cores
from clae_dist.data.decode import decode_rgb
from clae_dist.data.draws import uniforms
from clae_dist.data.manifest import Manifest
from clae_dist.data.shards import ShardReader
from clae_dist.data.views import CROP_DRAWS, crop_boxes, resized_crop


@dataclass(frozen=True)
class DataBench:
    image_size: int = 224
    chunk: int = 64  # images on which a stage is timed, and of a loader's batch
    repeats: int = 7
    workers: Sequence[int] = field(default_factory=lambda: sorted({0, 1, 2, usable_cores()}))
    batches: int = 3  # timed batches per worker, after its first
    rounds: int = 3  # repeats of the loaders, each of which starts processes
    rate: float = 0.0  # images per second of a training step; 0: unknown
    shards: str = ""  # as data.shards; empty: synthetic images
    split: str = "train"


@dataclass(frozen=True)
class Chunk:
    """The first images of a set, encoded and decoded, and the boxes of two views."""

    manifest: Manifest
    reader: ShardReader
    config: Config
    jpegs: list[bytes]
    images: list[torch.Tensor]
    boxes: np.ndarray  # (2, n, 4)

    @staticmethod
    def of(manifest: Manifest, settings: DataBench) -> Chunk:
        count = min(settings.chunk, manifest.num_samples(settings.split))
        data = Data(shards=str(manifest.folder), train_split=settings.split, image_size=settings.image_size)
        config = Config(data=data, batch=Batch(global_size=count))
        reader = ShardReader(manifest, settings.split)
        jpegs = [bytes(reader.encoded(*reader.place(sample))[0]) for sample in range(count)]
        images = [decode_rgb(data) for data in jpegs]
        heights, widths = np.array([image.shape[1:] for image in images]).T
        draws = [uniforms(CROP_DRAWS, 0, view, np.arange(count)) for view in (0, 1)]
        scale, ratio = config.augment.crop_scale, config.augment.crop_ratio
        boxes = np.stack([crop_boxes(draw, heights, widths, scale, ratio) for draw in draws])
        return Chunk(manifest, reader, config, jpegs, images, boxes)

    def crops(self, images: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """uint8 (2, n, 3, S, S), decoding first unless `images` are given."""
        size, count = self.config.data.image_size, len(self.jpegs)
        views = torch.empty((2, count, size, size, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
        for row in range(count):
            image = images[row] if images else decode_rgb(self.jpegs[row])
            for view in (0, 1):
                views[view, row] = resized_crop(image, self.boxes[view, row], size)
        return views
