"""Features of images, in batches.

# b images of a batch, N images, S pixels a side, F width of the features
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from clae_dist.cores import loader_processes
from clae_dist.data.evaluation_set import read_ahead
from clae_dist.data.images import FileImages, Images, Source, open_dataset
from clae_dist.data.shards import BadSampleError
from clae_dist.data.views import centre_view
from clae_dist.deploy.encoder import Encoder
from clae_dist.errors import ConfigError, DataError
from clae_dist.evaluation.features import frozen

_MANY = 512  # images, above which loader processes gain more time than their start takes


class Views(NamedTuple):
    """A batch of decoded images; `bad` are the positions of those that cannot be decoded, with the reasons."""

    views: torch.Tensor  # uint8 (b, 3, S, S)
    positions: torch.Tensor  # int64 (b,)
    labels: torch.Tensor  # int64 (b,), -1 without a label
    bad: dict[int, str]


class EmbeddedBatch(NamedTuple):
    """The features of a batch, and what `Views` has beside the views."""

    features: np.ndarray  # float32 (b, F)
    positions: np.ndarray
    labels: np.ndarray
    bad: dict[int, str]


class _Batches(Dataset[Views]):
    """`self[first]` is the batch that begins at position `first`."""

    def __init__(self, images: Images, image_size: int, batch_size: int) -> None:
        self._images, self._image_size, self._batch_size = copy.copy(images), image_size, batch_size
        self._images.transform = None  # which is not used, and may be an encoder's

    def __getitem__(self, first: int) -> Views:
        size = self._image_size
        views, labels, positions, bad = [torch.empty((0, 3, size, size), dtype=torch.uint8)], [], [], {}
        for position in range(first, min(first + self._batch_size, len(self._images))):
            try:
                pixels, label = self._images.read(position)
            except BadSampleError as error:
                bad[position] = f"{error.sample}: {error.reason}"
                continue
            views.append(centre_view(pixels, size)[None])
            labels.append(label)
            positions.append(position)
        return Views(torch.cat(views), torch.tensor(positions, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64), bad)


def embedded(images: Images, encoder: Encoder, batch_size: int = 256, num_workers: int = -1) -> Iterator[EmbeddedBatch]:
    """The features of all images in their order, computed on the device of the encoder, in evaluation mode without gradients.

    `num_workers` processes decode ahead; 0 decodes in this process, -1 chooses. Raises ConfigError for a batch size below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; use at least 1.")
    workers = _choose_workers(images, encoder.image_size) if num_workers < 0 else num_workers
    batch_bytes = batch_size * (3 * encoder.image_size**2 + 2 * 8)
    firsts = range(0, len(images), batch_size)
    for batch in read_ahead(_Batches(images, encoder.image_size, batch_size), firsts, batch_bytes, workers):
        pixels = batch.views.to(encoder.mean.device).to(encoder.mean.dtype) / 255
        with frozen(encoder):
            features = encoder(pixels) if len(pixels) else pixels.new_empty(0, encoder.num_features)
        yield EmbeddedBatch(features.float().cpu().numpy(), batch.positions.numpy(), batch.labels.numpy(), batch.bad)


def _choose_workers(images: Images, image_size: int) -> int:
    """Choose no processes for few images, for images in memory, and for sets of small images, whose decoding is cheap."""
    if isinstance(images, FileImages):
        cheap = images.in_memory
    else:
        cheap = image_size <= 64
    return 0 if cheap or len(images) < _MANY else loader_processes()


def embed(
    images: Source | Images,
    encoder: Encoder,
    *,
    split: str = "train",
    batch_size: int = 256,
    num_workers: int = -1,
    on_undecodable: Literal["raise", "nan"] = "raise",
    progress: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
    """Features float32 (N, F) of N images, one row per image in the order of the images, such as `open_dataset(…).ids`.

    Args:
        images: a folder of images, shards as `data.shards` names them, an opened data set, or a list of paths and PIL images.
        encoder: from `load_encoder`; its device computes (`encoder.cuda()`).
        split: the split of a set of shards.
        batch_size: images a batch.
        num_workers: processes that decode; 0 decodes in this one, -1 chooses.
        on_undecodable: "raise" raises DataError for an image that cannot be decoded, "nan" makes its row NaN.
        progress: called with the number of images of each batch.

    Raises ConfigError for an argument that cannot be used, and DataError for images or shards that cannot.
    """
    if on_undecodable not in ("raise", "nan"):
        raise ConfigError(f"on_undecodable is {on_undecodable!r}; use raise or nan.")
    opened = open_dataset(images, split)
    features_NF = np.full((len(opened), encoder.num_features), np.nan, dtype=np.float32)
    for batch in embedded(opened, encoder, batch_size, num_workers):
        if batch.bad and on_undecodable == "raise":
            raise DataError(f"{next(iter(batch.bad.values()))}; remove the image, or use on_undecodable='nan'.")
        features_NF[batch.positions] = batch.features
        progress(len(batch.positions) + len(batch.bad))
    return features_NF
