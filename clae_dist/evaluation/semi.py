"""Semi-supervised accuracy: the whole network fine-tuned on a class-balanced share of the labels (Chen et al. 2020, B.5).

# N labelled images of the train split, Q test images
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clae_dist.config.rules import Section, setting
from clae_dist.evaluation.classifier import Classifier
from clae_dist.evaluation.interval import accuracy_metrics
from clae_dist.evaluation.place import evenly
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject
from clae_dist.evaluation.tuning import Schedule, accuracy, cross_entropy, fit

_MAX_IDS = 10_000  # that evaluation.json lists of a subset; a larger one is known by its seed


@dataclass(frozen=True)
class SemiSettings(Section, prefix="semi"):
    """Settings of fine-tuning on few labels."""

    shares: tuple[float, ...] = setting(
        (0.01, 0.1), gt=0, le=1, help="Shares of the labels; a smaller one is part of a larger."
    )
    subsets: int = setting(1, ge=1, help="Subsets of each share, drawn with seeds from 0; accuracies are their mean.")
    epochs: int = setting(0, ge=0, zero="60 for shares up to 1 %, else 30", help="Epochs of fine-tuning.")
    batch: int = setting(256, ge=2, help="Images of a step, at most the subset.")
    learning_rate: float = setting(
        0.05, gt=0, help="Learning rate for a batch of 256; it grows with the batch, and falls to 0."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(len(self.shares) > 0, "shares", "name at least one share, such as [0.01, 0.1].")


class Semi(EvaluationProtocol):
    """The share of test images that the network gets right when few training images have labels."""

    name, title = "semi", "accuracy with few labels"
    Settings = SemiSettings
    collective = True
    uses_head = True
    own: SemiSettings

    def run(self, subject: Subject) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for share in sorted(self.own.shares):
            name = f"accuracy_{100 * share:g}"
            found = [self._accuracy(subject, share, seed) for seed in range(self.own.subsets)]
            for metric, value in accuracy_metrics(statistics.mean(found), len(subject.queries)).items():
                metrics[metric.replace("accuracy", name)] = value
            if len(found) > 1:
                metrics[f"{name}_deviation"] = statistics.stdev(found)
        return metrics

    def describe(self, settings: Mapping[str, Any]) -> str:
        shares = " and ".join(f"{100 * share:g} %" for share in settings["shares"])
        return f"all weights fine-tuned on {shares} of the labels, equally many of each class"

    def _accuracy(self, subject: Subject, share: float, seed: int) -> float:
        model, place = subject.parts()
        assert subject.head is not None
        rows = evenly(subject.bank.labels_N, max(subject.num_classes, round(share * len(subject.bank))), seed)
        if len(rows) <= _MAX_IDS:
            subject.details[f"ids of {100 * share:g} %, seed {seed}"] = subject.bank.ids_N[rows].tolist()
        epochs = self.own.epochs or (60 if share <= 0.01 else 30)
        batch = min(self.own.batch, len(rows))
        rate = self.own.learning_rate * batch / 256
        schedule = Schedule(epochs, rate, weight_decay=0.0, batch_size=batch, cosine=True, nesterov=True)
        classifier = Classifier(model, subject.head, model.evaluated_route)
        label = f"on {100 * share:g} % of the labels"
        tuned = fit(classifier, subject, schedule, cross_entropy, label, whole=True, rows=rows)
        return accuracy(tuned, subject, subject.queries, place.config.data.test_split, label)
