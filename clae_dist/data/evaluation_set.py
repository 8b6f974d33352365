"""Centre views of images for evaluation and embeddings, in batches in the order of the images.

# b images of a batch, S side of a view
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from clae_dist.data import transport
from clae_dist.data.draws import permutation
from clae_dist.data.images import Images, ShardImages
from clae_dist.data.loader import read_ahead
from clae_dist.data.manifest import Manifest
from clae_dist.data.shards import BadSampleError, ShardReader
from clae_dist.data.views import centre_view, supervised_view


class Views(NamedTuple):
    """The views of a batch; `bad` are the positions of images that cannot be decoded, with the reasons."""

    views: torch.Tensor  # uint8 (b, 3, S, S)
    labels: torch.Tensor  # int64 (b,), -1 without a label
    positions: torch.Tensor  # int64 (b,), in the data set
    bad: dict[int, str]


def read_views(
    images: Images, positions: Sequence[int] | np.ndarray, image_size: int, draws: np.ndarray | None = None
) -> Views:
    """Read the images at these positions, and skip those that cannot be decoded.

    With `draws`, a row an image, they are views for training (`supervised_view`), otherwise centre views.
    """
    views, labels, read, bad = [torch.empty((0, 3, image_size, image_size), dtype=torch.uint8)], [], [], {}
    for row, position in enumerate(map(int, positions)):
        try:
            pixels, label = images.read(position)
        except BadSampleError as error:
            bad[position] = f"{error.sample}: {error.reason}"
            continue
        view = centre_view(pixels, image_size) if draws is None else supervised_view(pixels, draws[row], image_size)
        views.append(view[None])
        labels.append(label)
        read.append(position)
    return Views(torch.cat(views), torch.tensor(labels, dtype=torch.int64), torch.tensor(read, dtype=torch.int64), bad)


class _Batches(Dataset[Views]):
    """A map-style dataset: `self[first]` is the batch that begins with positions[first]."""

    def __init__(self, images: Images, positions: Sequence[int] | np.ndarray, image_size: int, batch_size: int) -> None:
        self._images, self._positions, self._image_size, self._batch_size = images, positions, image_size, batch_size

    def __getitem__(self, first: int) -> Views:
        return read_views(self._images, self._positions[first : first + self._batch_size], self._image_size)


def read_batches(
    images: Images,
    positions: Sequence[int] | np.ndarray,
    image_size: int,
    batch_size: int,
    *,
    num_workers: int = 0,
    start: int = 0,
    step: int = 1,
) -> Iterator[Views]:
    """Every `step`-th batch of the images at `positions` from the `start`-th on, read ahead by `num_workers` processes.

    Ranks share the images with start = rank and step = world size. 0 processes: read in this one.
    """
    firsts = range(start * batch_size, len(positions), step * batch_size)
    batches = _Batches(images, positions, image_size, batch_size)
    batch_bytes = batch_size * (3 * image_size**2 + 2 * 8)
    return read_ahead(batches, firsts, num_workers, transport.needed_bytes(batch_bytes, num_workers))


class _Lists(Dataset[Views]):
    """A map-style dataset: `self[i]` are the images at the i-th list of positions, with the i-th draws if there are any."""

    def __init__(
        self, images: Images, lists: Sequence[Sequence[int] | np.ndarray], image_size: int, draws: Sequence[np.ndarray] | None
    ) -> None:
        self._images, self._lists, self._image_size, self._draws = images, lists, image_size, draws

    def __getitem__(self, number: int) -> Views:
        draws = self._draws[number] if self._draws else None
        return read_views(self._images, self._lists[number], self._image_size, draws)


class EvaluationSet:
    """A split, or a seeded choice of `limit` of its images (0: all). `workers`: loader processes; 0: load in this process."""

    def __init__(
        self, manifest: Manifest, split: str, image_size: int, limit: int = 0, seed: int = 0, workers: int = 0
    ) -> None:
        self.split = split
        self._images, self._image_size, self._workers = ShardImages(ShardReader(manifest, split)), image_size, workers
        total = len(self._images)
        self.ids = np.arange(total) if not 0 < limit < total else np.sort(permutation(total, seed)[:limit])

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, ids: Sequence[int] | np.ndarray) -> Views:
        """The views of the images with these ids; undecodable ones are skipped."""
        return read_views(self._images, ids, self._image_size)

    def batches(self, batch_size: int, start: int = 0, step: int = 1) -> Iterator[Views]:
        """`images` of every `step`-th batch from the `start`-th on."""
        return read_batches(
            self._images, self.ids, self._image_size, batch_size, num_workers=self._workers, start=start, step=step
        )

    def lists(self, ids: Sequence[Sequence[int] | np.ndarray], draws: Sequence[np.ndarray] | None = None) -> Iterator[Views]:
        """The images of each list of ids, read ahead; with `draws` as views for training (`read_views`)."""
        largest = max(map(len, ids), default=0) * (3 * self._image_size**2 + 2 * 8)
        lists = _Lists(self._images, ids, self._image_size, draws)
        return read_ahead(lists, range(len(ids)), self._workers, transport.needed_bytes(largest, self._workers))
