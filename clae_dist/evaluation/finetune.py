"""Accuracy of the whole network fine-tuned on all labels, with settings chosen on a held-out tenth of the train split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from clae_dist.config.rules import Section, setting
from clae_dist.data.draws import permutation
from clae_dist.evaluation.classifier import Classifier
from clae_dist.evaluation.interval import accuracy_metrics
from clae_dist.evaluation.linear import HELD_OUT
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject
from clae_dist.evaluation.tuning import Schedule, accuracy, cross_entropy, fit


@dataclass(frozen=True)
class FinetuneSettings(Section, prefix="finetune"):
    """Settings of fine-tuning."""

    learning_rates: tuple[float, ...] = setting((0.01, 0.05), gt=0, help="Learning rates to choose from; they fall to 0.")
    weight_decays: tuple[float, ...] = setting((0.0, 1e-4), ge=0, help="Weight decays to choose from.")
    epochs: int = setting(20, ge=1, help="Epochs of fine-tuning, for every choice.")
    batch: int = setting(256, ge=2, help="Images of a step.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("learning_rates", "weight_decays"):
            self.require(len(getattr(self, name)) > 0, name, "name at least one.")


class Finetune(EvaluationProtocol):
    """The share of test images that the network gets right after training all weights with labels."""

    name, title = "finetune", "fine-tuned accuracy"
    Settings = FinetuneSettings
    collective = True
    uses_head = True
    own: FinetuneSettings

    def run(self, subject: Subject) -> dict[str, float]:
        order = torch.from_numpy(permutation(len(subject.bank), subject.seed, 2))
        num_held = min(max(1, round(HELD_OUT * len(order))), len(order) - 1)
        held, kept = order[:num_held].sort().values, order[num_held:].sort().values
        grid = list(product(self.own.learning_rates, self.own.weight_decays))
        scores = [self._accuracy(subject, *choice, kept, held) for choice in grid] if len(grid) > 1 else [0.0]
        rate, decay = grid[scores.index(max(scores))]
        found = self._accuracy(subject, rate, decay, torch.arange(len(order)), None)
        metrics = {**accuracy_metrics(found, len(subject.queries)), "learning_rate": rate, "weight_decay": decay}
        return metrics if len(grid) == 1 else {**metrics, "held_out_accuracy": max(scores)}

    def describe(self, settings: Mapping[str, Any]) -> str:
        several = len(settings["learning_rates"]) * len(settings["weight_decays"]) > 1
        chosen = ", rate and weight decay chosen on a held-out tenth of them" if several else ""
        return f"all weights trained for {settings['epochs']} epochs on all labels of the train images{chosen}"

    def _accuracy(self, subject: Subject, rate: float, decay: float, rows: torch.Tensor, held: torch.Tensor | None) -> float:
        """Percent of the held-out rows of the bank, or of the test images, after training on `rows` of the bank."""
        model, place = subject.parts()
        assert subject.head is not None
        schedule = Schedule(self.own.epochs, rate, decay, min(self.own.batch, len(rows)), cosine=True, nesterov=True)
        classifier = Classifier(model, subject.head, model.evaluated_route)
        label = f"rate {rate:g}, weight decay {decay:g}"
        tuned = fit(classifier, subject, schedule, cross_entropy, label, whole=True, rows=rows)
        if held is None:
            return accuracy(tuned, subject, subject.queries, place.config.data.test_split, label)
        return accuracy(tuned, subject, subject.bank.rows(held), place.config.data.train_split, label)
