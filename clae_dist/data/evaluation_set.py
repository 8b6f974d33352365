"""The images of a split as evaluation sees them: one centre view each, in the order of their ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from clae_dist.data.draws import permutation
from clae_dist.data.manifest import Manifest
from clae_dist.data.shards import ShardReader
from clae_dist.data.views import centre_view


class EvaluationSet:
    """A split, or a seeded choice of `limit` of its images (0: all)."""

    def __init__(self, manifest: Manifest, split: str, image_size: int, limit: int = 0, seed: int = 0) -> None:
        self._reader = ShardReader(manifest, split)
        self._image_size = image_size
        total = sum(self._reader.sizes)
        self.ids = np.arange(total) if not 0 < limit < total else np.sort(permutation(total, seed)[:limit])

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, ids: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (b, 3, S, S) and labels int64 (b,) of these ids."""
        pairs = [self._reader.read(*self._reader.place(int(sample))) for sample in ids]
        views = [centre_view(image, self._image_size) for image, _ in pairs]
        return torch.stack(views), torch.tensor([label for _, label in pairs])

    def batches(
        self, batch_size: int, start: int = 0, step: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Images, labels and ids of every `step`-th batch from the `start`-th on: ranks share a set with (rank, size)."""
        for first in range(start * batch_size, len(self.ids), step * batch_size):
            ids = self.ids[first : first + batch_size]
            yield *self.images(ids), torch.from_numpy(ids)
