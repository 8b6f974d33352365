"""Passes of an encoder over changed images, in batches that the ranks share.

# b images of a batch, S side, F width of the features
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from clae_dist.data.evaluation_set import EvaluationSet, Views
from clae_dist.evaluation.features import Features, frozen
from clae_dist.evaluation.place import Place
from clae_dist.evaluation.protocol import Subject
from clae_dist.models import PretrainModel
from clae_dist.runs.checkpoint.safetensors_file import weights_digest

Change = Callable[[torch.Tensor, np.ndarray], torch.Tensor]  # uint8 images (b, 3, S, S) and ids (b,) → images


def over_batches(
    subject: Subject,
    images: EvaluationSet,
    key: Mapping[str, Any],
    work: Callable[[int, Views], Mapping[str, torch.Tensor]],
    label: str,
    variants: int = 1,
) -> list[dict[str, torch.Tensor]]:
    """The results of `work(variant, views)` for every batch of `images`, joined for each variant. Collective.

    Ranks share the batches; they stay on disk, and a start after a kill resumes with those that are missing. `key` describes
    variants and work beyond the encoder and the images. Every rank gets all results: keep them to few numbers an image.
    """
    model, place = subject.parts()
    batch_size = place.config.evaluation.batch_size
    batches = -(-len(images) // batch_size)
    full_key = {
        **key,
        "weights": weights_digest(model.state_dict()),
        "route": model.evaluated_route,
        "images": place.manifest.digest,
        "ids": hashlib.sha256(images.ids.tobytes()).hexdigest(),
        "split": images.split,
        "side": place.config.data.image_size,
        "batch": batch_size,
        "bfloat16": place.bfloat16,
    }

    def each(numbers: Sequence[int]) -> Iterator[Mapping[str, torch.Tensor]]:
        firsts = [number % batches * batch_size for number in numbers]
        views_of_each = images.lists([images.ids[first : first + batch_size] for first in firsts])
        for number, views in zip(numbers, views_of_each, strict=True):
            with frozen(model):
                yield work(number // batches, views)

    journal = place.shared(full_key, variants * batches, each, label, batch_size, variants * len(images))
    joined: list[dict[str, list[torch.Tensor]]] = [{} for _ in range(variants)]
    for number, tensors in journal:
        for name, tensor in tensors.items():
            joined[number // batches].setdefault(name, []).append(tensor)
    return [{name: torch.cat(parts) for name, parts in each_variant.items()} for each_variant in joined]


def changed_features(subject: Subject, images: EvaluationSet, key: Mapping[str, Any], change: Change, label: str) -> Features:
    """Features of changed images. Collective."""
    model, place = subject.parts()

    def work(_: int, views: Views) -> dict[str, torch.Tensor]:
        features = embed(place, model, change(views.views, views.positions.numpy()))
        return {"features": features, "labels": views.labels, "ids": views.positions}

    (found,) = over_batches(subject, images, key, work, label)
    return Features(found["features"], found["labels"], found["ids"])


def embed(place: Place, model: PretrainModel, images_b3SS: torch.Tensor) -> torch.Tensor:
    """float32 features (b, F) on the device of uint8 images, within `frozen`."""
    with place.autocast():
        return model.features(place.pixels(images_b3SS, model)).float()
