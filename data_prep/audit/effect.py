"""The effect of a patch on an encoder: the share of unrelated images that it moves into one cluster when it is pasted.

The only file of data_prep that knows encoders. Reference: Tejankar et al. 2023, PatchSearch, whose poison score this is.

# B images, S side, F width of the features, C clusters
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from clae_dist.deploy.encoder import Encoder, load_encoder
from clae_dist.evaluation.features import frozen
from clae_dist.evaluation.kmeans import kmeans

__all__ = ["BANK", "IMAGES", "Effect", "Encoder", "Judge", "load_encoder"]
IMAGES, BANK = 256, 1500  # that a patch is pasted on; that make the clusters
LEAST_GAIN = 0.2  # of all images, that must move into one cluster
LEAST_EXCESS = 2.0  # times as many as any other patch of the size moves
_CONTROLS = 8
_BATCH = 256


@dataclass(frozen=True)
class Effect:
    """`gain`: share of the images in one cluster with the patch minus the share without it, where that is largest.

    `control`: the largest such gain of other patches of this size: windows of unrelated images, and the patch with its pixels
    in another order. `label`: the most frequent class of the cluster, -1: none.
    """

    gain: float
    control: float
    label: int

    @property
    def is_poison(self) -> bool:
        return self.gain >= LEAST_GAIN and self.gain >= LEAST_EXCESS * self.control


class Judge:
    """Clusters of unrelated images, and images to paste patches on: uint8 (B, S, S, 3) as evaluation sees them."""

    def __init__(
        self, encoder: Encoder, bank_BSS3: np.ndarray, labels_B: np.ndarray, images_BSS3: np.ndarray, num_clusters: int
    ) -> None:
        self._encoder, self._images, self._bank = encoder, images_BSS3, bank_BSS3
        bank_BF = self._features(bank_BSS3)
        self._centre_F = bank_BF.mean(0)
        rows_BF = F.normalize(bank_BF - self._centre_F, dim=1)
        clusters_B = kmeans(rows_BF, num_clusters, seed=0)
        count = int(clusters_B.max()) + 1
        means_CF = torch.zeros((count, rows_BF.shape[1])).index_add_(0, clusters_B, rows_BF)
        self._means_CF = F.normalize(means_CF, dim=1)
        self._labels = [_most_frequent(labels_B[clusters_B.numpy() == cluster]) for cluster in range(count)]
        self._before_C = self._shares(images_BSS3)

    @property
    def side(self) -> int:
        """Pixels of the images' sides."""
        return int(self._images.shape[1])

    def effect(self, picture_hw3: np.ndarray) -> Effect:
        """The effect of a patch that is at most as large as the images, pasted at random places."""
        gain_C = self._gain(picture_hw3)
        cluster = int(gain_C.argmax())
        controls = [float(self._gain(control).max()) for control in self._others(picture_hw3)]
        return Effect(float(gain_C[cluster]), max(controls), self._labels[cluster])

    def _others(self, picture_hw3: np.ndarray) -> list[np.ndarray]:
        """The patch with its pixels in another order, and the windows of unrelated images with most contrast."""
        rng = np.random.default_rng(0)
        found = [rng.permutation(picture_hw3.reshape(-1, 3)).reshape(picture_hw3.shape) for _ in range(_CONTROLS // 2)]
        chosen = self._bank[rng.permutation(len(self._bank))[:64]]
        windows = [image[_place(rng, image, picture_hw3)] for image in chosen]
        windows.sort(key=lambda window: -float(window.std()))
        return [*found, *windows[: _CONTROLS - len(found)]]

    def _gain(self, picture_hw3: np.ndarray) -> torch.Tensor:
        """How much larger the share of the images in each cluster (C,) is with the patch."""
        rng, pasted = np.random.default_rng(1), self._images.copy()
        for image in pasted:
            image[_place(rng, image, picture_hw3)] = picture_hw3
        return self._shares(pasted) - self._before_C

    def _shares(self, images_BSS3: np.ndarray) -> torch.Tensor:
        """The share of the images in each cluster (C,)."""
        rows_BF = F.normalize(self._features(images_BSS3) - self._centre_F, dim=1)
        nearest_B = (rows_BF @ self._means_CF.T).argmax(1)
        return torch.bincount(nearest_B, minlength=len(self._means_CF)).double() / len(nearest_B)

    def _features(self, images_BSS3: np.ndarray) -> torch.Tensor:
        with frozen(self._encoder):
            parts = torch.from_numpy(images_BSS3).permute(0, 3, 1, 2).split(_BATCH)
            return torch.cat([self._encoder(part.float() / 255).float() for part in parts])


def _place(rng: np.random.Generator, image_SS3: np.ndarray, picture_hw3: np.ndarray) -> tuple[slice, slice]:
    """A random place in the image, of the size of the patch."""
    top, left = (int(rng.integers(0, image_SS3.shape[axis] - picture_hw3.shape[axis] + 1)) for axis in (0, 1))
    return slice(top, top + picture_hw3.shape[0]), slice(left, left + picture_hw3.shape[1])


def _most_frequent(labels: np.ndarray) -> int:
    known = labels[labels >= 0]
    return int(np.bincount(known).argmax()) if len(known) else -1
