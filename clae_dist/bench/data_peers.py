"""How other packages turn shards into samples and JPEGs into two views, for `clae bench data`.

# n images of a chunk, S side of a view
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import functional as pil_functional
from torchvision.transforms import v2

from clae_dist.data.tar_index import IMAGES

Jpegs = Sequence[bytes]


def pil_crops(jpegs: Jpegs, boxes: np.ndarray, size: int) -> torch.Tensor:
    """uint8 (2, n, 3, S, S): Pillow decodes once; torchvision cuts `boxes` (2, n, 4), as RandomResizedCrop does."""
    views = torch.empty((2, len(jpegs), 3, size, size), dtype=torch.uint8)
    for row, data in enumerate(jpegs):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        for view in (0, 1):
            top, left, height, width = boxes[view, row].tolist()
            cut = pil_functional.resized_crop(image, top, left, height, width, [size, size])
            views[view, row] = pil_functional.pil_to_tensor(cut)
    return views


def huffman_only(jpegs: Jpegs) -> None:
    """Entropy decoding and almost nothing else: libjpeg computes one grey pixel of each block of 64."""
    for data in jpegs:
        image = Image.open(io.BytesIO(data))
        image.draft("L", (1, 1))
        image.load()


def photometric(size: int) -> list[v2.Transform]:
    """SimCLR's augmentation after the crop, in torchvision v2."""
    radius = max(1, size // 20)
    return [
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(2 * radius + 1, (0.1, 2.0))], 0.5),
    ]


def kornia_photometric(size: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """`photometric` in kornia, on a batch, with parameters for each image; None if it is not installed."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of its imports
            import kornia.augmentation as kornia
    except ImportError:
        return None
    width = 2 * max(1, size // 20) + 1
    chain: Callable[[torch.Tensor], torch.Tensor] = kornia.AugmentationSequential(
        kornia.RandomHorizontalFlip(p=0.5),
        kornia.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        kornia.RandomGrayscale(p=0.2),
        kornia.RandomGaussianBlur((width, width), (0.1, 2.0), p=0.5),
    )
    return chain


def simclr_transform(size: int, of: str) -> Callable[[Image.Image], torch.Tensor]:
    """SimCLR's augmentation as users of torchvision write it: "v1" on Pillow images, "v2" on uint8 tensors."""
    random_part = [v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True), *photometric(size)]
    if of == "v1":
        return v2.Compose([*random_part, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    return v2.Compose([v2.ToImage(), *random_part, v2.ToDtype(torch.float32, scale=True)])


class PilPairs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The usual data set: one JPEG at a time, decoded by Pillow, transformed twice."""

    def __init__(self, jpegs: Jpegs, size: int, of: str = "v1") -> None:
        self.jpegs, self.transform = jpegs, simclr_transform(size, of)

    def __len__(self) -> int:
        return len(self.jpegs)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = Image.open(io.BytesIO(self.jpegs[row])).convert("RGB")
        return self.transform(image), self.transform(image)


def webdataset_samples(path: Path) -> Iterator[bytes]:
    """The encoded images of a shard by plain WebDataset, which leaves its file to the garbage collector."""
    from webdataset.compat import WebDataset

    for sample in WebDataset(str(path), shardshuffle=False):
        image = next((value for key, value in sample.items() if key.lower() in IMAGES), None)
        if image is not None:
            yield image
