"""A linear classifier beside an exported encoder: head.safetensors, with the names of its classes in the header.

# N images of the bank, F width of the features, C classes
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clae_dist.deploy.encoder import Encoder
from clae_dist.deploy.run_images import RunImages
from clae_dist.errors import ConfigError
from clae_dist.evaluation.features import Features, frozen
from clae_dist.evaluation.linear import LinearHead, fit_head
from clae_dist.reading import ReadError, is_list_of, is_text, parse_json

_BATCH = 250


@dataclass(frozen=True)
class Head:
    """A linear classifier of the encoder's features, and the name of each class."""

    linear: LinearHead
    classes: list[str]


def fit(encoder: Encoder, images: RunImages, say: Callable[[str], None]) -> Head:
    """The linear probe of `clae evaluate`, of the train split. Raises ConfigError for a set with fewer than two classes."""
    settings = images.config.evaluation
    bank_set = images.split(images.config.data.train_split, settings.train_images)
    say(f"head: features of {len(bank_set):,} images")
    features, labels, ids = [], [], []
    with frozen(encoder):
        for views in bank_set.batches(_BATCH):
            features.append(encoder(views.views.float() / 255))
            labels.append(views.labels)
            ids.append(views.positions)
    bank = Features(torch.cat(features), torch.cat(labels), torch.cat(ids))
    bank = bank.rows((bank.labels_N >= 0).nonzero()[:, 0])
    present, labels_N = torch.unique(bank.labels_N, return_inverse=True)
    if len(present) < 2:
        raise ConfigError(
            f"{images.manifest.where} has {len(present)} classes with labelled images; a head needs 2, omit --head."
        )
    bank = Features(bank.features_NF, labels_N, bank.ids_N)
    linear = fit_head(bank, len(present), settings.linear_iterations, settings.linear_penalty, images.config.seed)
    return Head(linear, [images.manifest.classes[label] for label in present.tolist()])


def write_head(path: Path, head: Head, weights: str) -> None:
    """`weights` is the digest of the encoder."""
    metadata = {"classes": json.dumps(head.classes), "weights": weights}
    save_file({"weight": head.linear.weight.contiguous(), "bias": head.linear.bias.contiguous()}, path, metadata)


def read_head(path: Path, encoder: Encoder) -> Head:
    """Raises ConfigError for a file that is no head of this encoder."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weight, bias = file.get_tensor("weight").float(), file.get_tensor("bias").float()
        classes = parse_json(metadata.get("classes", "").encode())
    except (SafetensorError, OSError, ReadError) as error:
        raise _unusable(path, str(error)) from None
    if metadata.get("weights") != encoder.weights_digest():
        raise _unusable(path, "it is of another encoder")
    if (
        not is_list_of(is_text)(classes)
        or weight.shape != (encoder.num_features, len(classes))
        or bias.shape != weight.shape[1:]
    ):
        raise _unusable(path, f"{tuple(weight.shape)} weights do not fit the encoder and the names of classes")
    return Head(LinearHead(weight, bias), classes)


def _unusable(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path} cannot be used ({reason}); export it again with `clae export RUN --head`.")
