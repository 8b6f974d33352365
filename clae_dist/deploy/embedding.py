"""Features of images, in batches.

# b images of a batch, N images, S pixels a side, F width of the features
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from clae_dist.cores import loader_processes
from clae_dist.data.evaluation_set import read_batches
from clae_dist.data.images import FileImages, Images, Source, open_dataset
from clae_dist.deploy.encoder import Encoder
from clae_dist.errors import ConfigError, DataError
from clae_dist.evaluation.features import frozen

LOOKS = ("brightness", "contrast", "sharpness")
_MANY = 512  # images, above which loader processes gain more time than their start takes


class EmbeddedBatch(NamedTuple):
    """The features of a batch with the other fields of `Views`."""

    features: np.ndarray  # float32 (b, F)
    looks: dict[str, np.ndarray]  # of the decoded images, float32 (b,) each; see `looks_of`
    positions: np.ndarray
    labels: np.ndarray
    bad: dict[int, str]


def embedded(
    images: Images, encoder: Encoder, batch_size: int = 256, num_workers: int = -1, positions: Sequence[int] | None = None
) -> Iterator[EmbeddedBatch]:
    """The features of the images at `positions`, by default of all, computed on the device of the encoder, in evaluation mode
    without gradients.

    `num_workers` processes decode ahead; 0 decodes in this process, -1 chooses. Raises ConfigError for a batch size below 1.
    """
    check_batch_size(batch_size)
    positions = range(len(images)) if positions is None else positions
    workers = _choose_workers(images, encoder.image_size) if num_workers < 0 else num_workers
    images = copy.copy(images)
    images.transform = None  # not used here; it may hold an encoder, which would be sent to the loader processes
    for batch in read_batches(images, positions, encoder.image_size, batch_size, num_workers=workers):
        pixels = batch.views.to(encoder.mean.device).to(encoder.mean.dtype) / 255
        with frozen(encoder):
            features = encoder(pixels) if len(pixels) else pixels.new_empty(0, encoder.num_features)
        found = looks_of(pixels) if len(pixels) else dict.fromkeys(LOOKS, pixels.new_empty(0))
        looks = {name: values.float().cpu().numpy() for name, values in found.items()}
        yield EmbeddedBatch(features.float().cpu().numpy(), looks, batch.positions.numpy(), batch.labels.numpy(), batch.bad)


def check_batch_size(batch_size: int) -> None:
    """Raises ConfigError for a batch size below 1."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; use at least 1.")


def looks_of(images_b3SS: torch.Tensor) -> dict[str, torch.Tensor]:
    """Brightness (mean grey level), contrast (its deviation) and sharpness (mean absolute Laplacian) of images in [0, 1]."""
    grey_bSS = images_b3SS.mean(1)
    inner = grey_bSS[:, 1:-1, 1:-1]
    around = grey_bSS[:, :-2, 1:-1] + grey_bSS[:, 2:, 1:-1] + grey_bSS[:, 1:-1, :-2] + grey_bSS[:, 1:-1, 2:]
    flat_bP = grey_bSS.flatten(1)
    values = flat_bP.mean(1), flat_bP.std(1, correction=0), (around - 4 * inner).abs().flatten(1).mean(1)
    return dict(zip(LOOKS, values, strict=True))


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
