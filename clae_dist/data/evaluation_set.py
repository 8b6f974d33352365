"""The images of a split for evaluation: one centre view each, in the order of their ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from clae_dist.data import transport
from clae_dist.data.draws import permutation
from clae_dist.data.loader import Item, forkserver, plain_errors, start_loader_process
from clae_dist.data.manifest import Manifest
from clae_dist.data.shards import BadSampleError, ShardReader
from clae_dist.data.views import centre_view
from clae_dist.lifetime import main_module_hidden

_Images = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class EvaluationSet:
    """A split, or a seeded choice of `limit` of its images (0: all). `workers`: loader processes; 0: load in this process."""

    def __init__(
        self, manifest: Manifest, split: str, image_size: int, limit: int = 0, seed: int = 0, workers: int = 0
    ) -> None:
        self._reader = ShardReader(manifest, split)
        self._image_size = image_size
        self._workers = workers
        total = sum(self._reader.sizes)
        self.ids = np.arange(total) if not 0 < limit < total else np.sort(permutation(total, seed)[:limit])

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, ids: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """uint8 (b, 3, S, S), labels int64 (b,) and ids int64 (b,) of these images; undecodable ones are skipped."""
        size = self._image_size
        views, labels, found = [torch.empty((0, 3, size, size), dtype=torch.uint8)], [], []
        for sample in map(int, ids):
            try:
                image, label = self._reader.read(*self._reader.place(sample))
            except BadSampleError:
                continue
            views.append(centre_view(image, size)[None])
            labels.append(label)
            found.append(sample)
        return torch.cat(views), torch.tensor(labels, dtype=torch.int64), torch.tensor(found, dtype=torch.int64)

    def batches(
        self, batch_size: int, start: int = 0, step: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """`images` of every `step`-th batch from the `start`-th on: ranks share a set with (rank, size)."""
        images: Dataset[_Images] = _Batches(self, batch_size)
        firsts = range(start * batch_size, len(self.ids), step * batch_size)
        yield from read_ahead(images, firsts, batch_size * (3 * self._image_size**2 + 2 * 8), self._workers)


def read_ahead(batches: Dataset[Item], indices: Sequence[int], batch_bytes: int, num_workers: int) -> Iterator[Item]:
    """`batches[index]` for each of the indices, in their order, read ahead by `num_workers` processes (0: by this one)."""
    if not transport.fits(transport.needed_bytes(batch_bytes, num_workers)):
        batches = transport.ThroughPipes(batches)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        prefetch_factor=transport.PREFETCH if num_workers else None,
        worker_init_fn=start_loader_process,
        multiprocessing_context=forkserver() if num_workers else None,
    )
    with main_module_hidden():
        batches_read = iter(loader)
    yield from plain_errors(batches_read)


class _Batches(Dataset[_Images]):
    """A map-style dataset: `self[first]` is the batch of an evaluation set that begins with its image number `first`."""

    def __init__(self, images: EvaluationSet, batch_size: int) -> None:
        self._images, self._batch_size = images, batch_size

    def __getitem__(self, first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids = self._images.ids[first : first + self._batch_size]
        return self._images.images(ids)
