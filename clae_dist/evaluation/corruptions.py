"""Accuracy on corrupted test images, of the linear probe that was fitted to clean ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from clae_dist.config.rules import Section, setting
from clae_dist.data.evaluation_set import Views
from clae_dist.evaluation.corruption_kinds import KINDS, LARGEST_CIFAR, SEVERITIES, Constants, corrupt
from clae_dist.evaluation.interval import accuracy_metrics
from clae_dist.evaluation.passes import embed, over_batches
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject


@dataclass(frozen=True)
class CorruptionSettings(Section, prefix="corruptions"):
    """Settings of the protocol `corruptions`."""

    images: int = setting(
        2_000,
        ge=0,
        zero="all",
        help="Test images, of more a choice that is the same for every run; each is corrupted 65 times.",
    )
    kinds: tuple[str, ...] = setting(KINDS, help="The corruptions: all that need no photographs, or some of them.")
    constants: Literal["auto", "cifar", "imagenet"] = setting(
        "auto", help="Strengths of the severities. auto: CIFAR-10-C's up to 64 pixels a side, ImageNet-C's above."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = len(self.kinds) > 0 and set(self.kinds) <= set(KINDS)
        self.require(known, "kinds", f"use some of {', '.join(KINDS)}.")


class Corruptions(EvaluationProtocol):
    """Accuracy under thirteen corruptions in five severities; snow and frost, which need photographs, are not among them."""

    name, title = "corruptions", "accuracy on corrupted images"
    uses_head = collective = True
    Settings = CorruptionSettings

    def run(self, subject: Subject) -> dict[str, float]:
        (model, place), head, constants = subject.parts(), subject.head, self._constants(subject)
        assert head is not None
        images = place.images(place.config.data.test_split, self.own.images)
        variants = [("", 0), *((kind, severity) for kind in self.own.kinds for severity in SEVERITIES)]
        label_of = dict(zip(subject.queries.ids_N.tolist(), subject.queries.labels_N.tolist(), strict=True))

        def work(variant: int, views: Views) -> dict[str, torch.Tensor]:
            kind, severity = variants[variant]
            changed = corrupt(views.views, kind, severity, views.positions.numpy(), subject.seed, constants)
            predicted = head.logits(embed(place, model, changed).cpu()).argmax(1)
            labels = torch.tensor([label_of.get(number, -1) for number in views.positions.tolist()])  # -1: without a label
            return {"right": (predicted == labels)[labels >= 0].byte()}

        digest = [float(head.weight.double().sum()), float(head.weight.double().abs().sum())]
        key = {"corruptions": constants, "seed": subject.seed, "head": digest, "kinds": list(self.own.kinds)}
        results = over_batches(subject, images, key, work, "corrupted images", len(variants))
        shares = {name: 100 * float(one["right"].double().mean()) for name, one in zip(variants, results, strict=True)}
        return self._metrics(subject, shares, len(results[0]["right"]))

    def _metrics(self, subject: Subject, shares: Mapping[tuple[str, int], float], count: int) -> dict[str, float]:
        kinds = self.own.kinds
        corrupted = [shares[kind, severity] for kind in kinds for severity in SEVERITIES]
        mean = sum(corrupted) / len(corrupted)
        for kind in kinds:
            subject.details[kind] = [shares[kind, severity] for severity in SEVERITIES]
        return {
            **accuracy_metrics(mean, count),
            "clean_accuracy": shares["", 0],
            **{f"severity_{s}_accuracy": sum(shares[kind, s] for kind in kinds) / len(kinds) for s in SEVERITIES},
            **{f"{kind}_accuracy": sum(shares[kind, s] for s in SEVERITIES) / len(SEVERITIES) for kind in kinds},
            "images": float(count),
        }

    def _constants(self, subject: Subject) -> Constants:
        _, place = subject.parts()
        if self.own.constants == "auto":
            return "cifar" if place.config.data.image_size <= LARGEST_CIFAR else "imagenet"
        constants: Constants = self.own.constants
        return constants

    def settings(self, subject: Subject) -> dict[str, Any]:
        return {**super().settings(subject), "constants": self._constants(subject)}

    def describe(self, settings: Mapping[str, Any]) -> str:
        benchmark = "CIFAR-10-C" if settings["constants"] == "cifar" else "ImageNet-C"
        kinds = len(settings["kinds"])
        number = f"{settings['images']:,}" if settings["images"] else "all"
        return (
            f"mean accuracy of logistic regression, fitted to clean train images, on {number} test images under {kinds} of the "
            f"corruptions of {benchmark} in 5 severities (its constants, not its files; without snow and frost)"
        )
