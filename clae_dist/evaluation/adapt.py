"""Accuracy on corrupted test images with and without adaptation to them at test time.

# B images of a batch, C classes, F width of the features, M methods, T templates
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from clae_dist.config.rules import Section, setting
from clae_dist.data.draws import permutation
from clae_dist.errors import ConfigError
from clae_dist.evaluation.adaptation import METHODS, Adapted, How, Prototypes, class_means, has_batch_norms, prototypes
from clae_dist.evaluation.corruption_kinds import KINDS, LARGEST_CIFAR, Constants, corrupt
from clae_dist.evaluation.interval import accuracy_metrics
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject
from clae_dist.reading import ReadError, open_regular
from clae_dist.runs.checkpoint.safetensors_file import weights_digest


@dataclass(frozen=True)
class AdaptSettings(Section, prefix="adapt"):
    """Settings of the protocol `adapt`."""

    images: int = setting(2_000, ge=0, zero="all", help="Test images, of more a choice that is the same for every run.")
    kinds: tuple[str, ...] = setting(
        ("gaussian_noise", "defocus_blur", "contrast", "jpeg"), help="The corruptions; each is a stream of its own."
    )
    severity: int = setting(5, ge=1, le=5, help="Severity of the corruptions.")
    batch: int = setting(200, ge=2, help="Images of a batch, to which the encoder adapts before the next comes.")
    seeds: int = setting(3, ge=1, help="Orders of the images; accuracies are means over them.")
    learning_rate: float = setting(1e-3, ge=0, help="Learning rate of the norm layers' scales and shifts.")
    steps: int = setting(1, ge=1, help="Steps towards the codes of a batch, for each set of centroids.")
    epsilon: float = setting(0.7, gt=0, help="Smoothness of the transport codes.")
    marginal: Literal["uniform", "source"] = setting(
        "uniform",
        help="Share of each class in a batch that the codes assume: equal, or the mean prediction of the encoder as it is.",
    )
    centroids: str = setting(
        "",
        help="A .safetensors file with a tensor `centroids`, (classes, features) or (templates, classes, features), such as "
        "texts mapped to the feature space; empty: class means of the train images.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = len(self.kinds) > 0 and set(self.kinds) <= set(KINDS)
        self.require(known, "kinds", f"use some of {', '.join(KINDS)}.")


class Adapt(EvaluationProtocol):
    """Accuracy under corruption after adaptation by transport codes, beside TENT, batch statistics and no adaptation."""

    name, title = "adapt", "adapted to corrupted images"
    collective = True
    Settings = AdaptSettings
    own: AdaptSettings

    def run(self, subject: Subject) -> dict[str, float]:
        (model, place), own = subject.parts(), self.own
        fixed = prototypes(subject.bank, self._centroids(subject))
        images = place.images(place.config.data.test_split, own.images)
        label_of = dict(zip(subject.queries.ids_N.tolist(), subject.queries.labels_N.tolist(), strict=True))
        labelled = np.array([number for number in images.ids.tolist() if number in label_of])
        streams = [(kind, seed) for kind in own.kinds for seed in range(own.seeds)]
        key = {
            "adapt": {**self.settings(subject), "seed": subject.seed},
            "weights": weights_digest(model.state_dict()),
            "route": model.evaluated_route,
            "images": place.manifest.digest,
            "ids": hashlib.sha256(labelled.tobytes()).hexdigest(),
            "split": images.split,
            "side": place.config.data.image_size,
            "prototypes": hashlib.sha256(fixed.weight_TCF.numpy().tobytes()).hexdigest(),
        }

        def work(numbers: Sequence[int]) -> Iterator[Mapping[str, torch.Tensor]]:
            for number in numbers:
                kind, seed = streams[number]
                order = labelled[permutation(len(labelled), subject.seed, seed)]
                batches = np.array_split(order, max(1, round(len(order) / own.batch)))
                yield {"right": self._stream(subject, fixed, kind, images.lists(batches), label_of)}

        journal = place.shared(key, len(streams), work, "adapting", len(labelled), len(streams) * len(labelled))
        right = {streams[number]: tensors["right"] for number, tensors in journal}
        return self._metrics(subject, right, len(labelled))

    def _stream(
        self, subject: Subject, fixed: Prototypes, kind: str, batches: Iterator[Any], label_of: Mapping[int, int]
    ) -> torch.Tensor:
        """How many images each method gets right (M,), in one stream."""
        (model, place), own = subject.parts(), self.own
        how = How(own.learning_rate, own.steps, own.epsilon, own.marginal)
        constants: Constants = "cifar" if place.config.data.image_size <= LARGEST_CIFAR else "imagenet"
        adapted = [Adapted(model, fixed, method, how) for method in METHODS]
        right_M = torch.zeros(len(METHODS), dtype=torch.int64)
        for views in batches:
            changed = corrupt(views.views, kind, own.severity, views.positions.numpy(), subject.seed, constants)
            pixels = place.pixels(changed, model)
            labels = torch.tensor([label_of[number] for number in views.positions.tolist()])
            source_C = adapted[0].probabilities(pixels).mean(0)
            right_M += torch.tensor([int((one.predict(pixels, source_C).cpu() == labels).sum()) for one in adapted])
        return right_M

    def _metrics(self, subject: Subject, right: Mapping[tuple[str, int], torch.Tensor], count: int) -> dict[str, float]:
        share = {stream: (100 * found.double() / count).tolist() for stream, found in right.items()}
        metrics: dict[str, float] = {}
        for number, method in enumerate(METHODS):
            by_seed = [fmean(share[kind, seed][number] for kind in self.own.kinds) for seed in range(self.own.seeds)]
            metrics[f"{method}_accuracy"] = fmean(by_seed)
            metrics[f"{method}_deviation"] = stdev(by_seed) if len(by_seed) > 1 else 0.0
            subject.details[method] = [
                fmean(share[kind, seed][number] for seed in range(self.own.seeds)) for kind in self.own.kinds
            ]
        return {**accuracy_metrics(metrics["ot_accuracy"], count), **metrics, "images": float(count)}

    def _centroids(self, subject: Subject) -> torch.Tensor:
        """(T, C, F). Raises ConfigError for a file that does not fit."""
        shape = (subject.num_classes, subject.bank.features_NF.shape[1])
        if not self.own.centroids:
            return class_means(subject.bank, subject.num_classes)
        path = Path(self.own.centroids).expanduser()
        try:
            with open_regular(path) as file:
                found = load(file.read())["centroids"]
        except (ReadError, OSError, SafetensorError, KeyError) as error:
            raise ConfigError(
                f"adapt.centroids is {str(path)!r}, which cannot be read as a safetensors file with a tensor `centroids` "
                f"({error}); write it with safetensors.torch.save_file."
            ) from None
        if found.ndim not in (2, 3) or found.shape[-2:] != shape or not found.isfinite().all():
            raise ConfigError(
                f"adapt.centroids has the shape {tuple(found.shape)}; this encoder and set need finite values of (templates,) "
                f"{shape[0]} classes and {shape[1]} features."
            )
        return found if found.ndim == 3 else found[None]

    def settings(self, subject: Subject) -> dict[str, Any]:
        if not self.own.centroids:
            return super().settings(subject)
        digest = hashlib.sha256(self._centroids(subject).float().numpy().tobytes()).hexdigest()
        return {**super().settings(subject), "centroids_digest": digest[:16]}

    def note(self, subject: Subject) -> str:
        model, _ = subject.parts()
        if has_batch_norms(model.encoder):
            return ""
        return "the encoder has no batch norms: `bn` of adapt is its accuracy without adaptation."

    def describe(self, settings: Mapping[str, Any]) -> str:
        number = f"{settings['images']:,}" if settings["images"] else "all"
        return (
            f"nearest class centroid on {number} test images under {len(settings['kinds'])} corruptions of severity "
            f"{settings['severity']}, the norm layers adapted online to batches of {settings['batch']} by optimal-transport "
            f"codes; beside it TENT, batch statistics and no adaptation; mean of {settings['seeds']} orders"
        )
