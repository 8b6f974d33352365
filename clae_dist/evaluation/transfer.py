"""Transfer of an encoder to further labelled sets: accuracy of a linear classifier on each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from clae_dist.config.rules import Section, setting
from clae_dist.errors import DataError
from clae_dist.evaluation.classifier import with_head
from clae_dist.evaluation.finetune import Finetune, FinetuneSettings
from clae_dist.evaluation.interval import accuracy_metrics
from clae_dist.evaluation.linear import linear_probe
from clae_dist.evaluation.place import Place
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject
from clae_dist.evaluation.scored import Scored, scored


@dataclass(frozen=True)
class TransferSettings(Section, prefix="transfer"):
    """Settings of the protocol `transfer`."""

    sets: tuple[str, ...] = setting(
        (), help="Folders of labelled shards with train and test split, resized to the evaluated side."
    )
    finetune_epochs: int = setting(
        0, ge=0, zero="no fine-tuning", help="Epochs of fine-tuning all weights on each set, in the manner of `finetune`."
    )


class Transfer(EvaluationProtocol):
    """Mean over further sets of the accuracy of a linear classifier of each set's features."""

    name, title = "transfer", "transfer"
    uses_labels = False  # of the run's own set
    collective = True
    Settings = TransferSettings

    def skipped(self, subject: Subject) -> str:
        return "" if self.own.sets else "transfer.sets is empty; name folders of shards: transfer.sets=[/data/eurosat]."

    def run(self, subject: Subject) -> dict[str, float]:
        _, place = subject.parts()
        metrics: dict[str, float] = {}
        linear: list[str] = []
        for location in self.own.sets:
            name, further, pair = self._features(subject, location)
            name = name if f"{name}_accuracy" not in metrics else f"{name}_{len(metrics) + 1}"
            linear.append(f"{name}_accuracy")
            found: dict[str, float] = place.world.run_on_main(lambda pair=pair: _accuracy(subject, pair))
            metrics |= {f"{name}_{metric}": value for metric, value in found.items()}
            if self.own.finetune_epochs:
                elsewhere = replace(subject, bank=pair.bank, queries=pair.queries, place=further)
                protocol = Finetune(FinetuneSettings(epochs=self.own.finetune_epochs))
                metrics |= {f"{name}_finetuned_{metric}": value for metric, value in protocol.run(with_head(elsewhere)).items()}
        accuracies = [value for metric, value in metrics.items() if metric in linear]
        return {"mean_accuracy": sum(accuracies) / len(accuracies), **metrics}

    def _features(self, subject: Subject, location: str) -> tuple[str, Place, Scored]:
        """A set's name, its images and the features of the labelled ones. Collective. Raises DataError without labels."""
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
        return name, further, pair

    def describe(self, settings: Mapping[str, Any]) -> str:
        return f"mean accuracy of logistic regression on the features of {len(settings['sets'])} further sets"


def _accuracy(subject: Subject, pair: Scored) -> dict[str, float]:
    settings = subject.settings
    iterations, penalty = settings.linear_iterations, settings.linear_penalty
    probe = linear_probe(pair.bank, pair.queries, iterations, penalty, subject.seed, subject.device)
    return accuracy_metrics(probe.accuracy, len(pair.queries))
