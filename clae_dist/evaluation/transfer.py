"""Transfer of an encoder to further labelled sets: accuracy of a linear classifier on each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clae_dist.config.rules import Section, setting
from clae_dist.errors import DataError
from clae_dist.evaluation.interval import accuracy_metrics
from clae_dist.evaluation.linear import linear_probe
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject
from clae_dist.evaluation.scored import Scored, scored


@dataclass(frozen=True)
class TransferSettings(Section, prefix="transfer"):
    """Settings of the protocol `transfer`."""

    sets: tuple[str, ...] = setting(
        (), help="Folders of labelled shards with train and test split, resized to the evaluated side."
    )


class Transfer(EvaluationProtocol):
    """Mean over further sets of the accuracy of a linear classifier of each set's features."""

    name, title = "transfer", "transfer"
    summary = "accuracy of a linear probe on each of further labelled sets"
    uses_labels = False  # of the run's own set
    collective = True
    Settings = TransferSettings

    def skipped(self, subject: Subject) -> str:
        return "" if self.own.sets else "transfer.sets is empty; name folders of shards: transfer.sets=[/data/eurosat]."

    def run(self, subject: Subject) -> dict[str, float]:
        _, place = subject.parts()
        metrics: dict[str, float] = {}
        for location in self.own.sets:
            name, pair = self._features(subject, location)
            name = name if f"{name}_accuracy" not in metrics else f"{name}_{len(metrics) + 1}"
            found: dict[str, float] = place.world.run_on_main(lambda pair=pair: _accuracy(subject, pair))
            metrics |= {f"{name}_{metric}": value for metric, value in found.items()}
        accuracies = [value for metric, value in metrics.items() if metric.endswith("_accuracy")]
        return {"mean_accuracy": sum(accuracies) / len(accuracies), **metrics}

    def _features(self, subject: Subject, location: str) -> tuple[str, Scored]:
        """The name of a set, and the features of its labelled images. Collective. Raises DataError without labels."""
        model, place = subject.parts()
        further, data = place.further(location), place.config.data
        name = re.sub(r"\W+", "_", further.manifest.name).strip("_") or "set"
        splits = (data.train_split, data.test_split)
        bank, queries = (
            further.features({"after": model}, further.images(split), f"features, {name} {split}")["after"] for split in splits
        )
        pair = scored(bank, queries, *splits)
        if pair.problem:
            raise DataError(f"transfer.sets has {further.manifest.where}, which cannot be used: {pair.problem}.")
        for note in pair.notes:
            place.say(f"{name}: {note}")
        return name, pair

    def describe(self, settings: Mapping[str, Any]) -> str:
        return f"mean accuracy of logistic regression on the features of {len(settings['sets'])} further sets"


def _accuracy(subject: Subject, pair: Scored) -> dict[str, float]:
    settings = subject.settings
    iterations, penalty = settings.linear_iterations, settings.linear_penalty
    probe = linear_probe(pair.bank, pair.queries, iterations, penalty, subject.seed, subject.device)
    return accuracy_metrics(probe.accuracy, len(pair.queries))
