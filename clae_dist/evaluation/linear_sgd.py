"""Linear probe as the papers train it: SGD on augmented images with a frozen encoder, for numbers that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clae_dist.config.rules import Section, setting
from clae_dist.evaluation.classifier import Classifier
from clae_dist.evaluation.interval import accuracy_metrics
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject
from clae_dist.evaluation.tuning import Schedule, accuracy, cross_entropy, fit


@dataclass(frozen=True)
class LinearSgdSettings(Section, prefix="linear_sgd"):
    """Settings of the linear probe by SGD; the defaults are those of ImageNet."""

    epochs: int = setting(90, ge=1, help="Epochs; 100 are usual for CIFAR-10.")
    batch: int = setting(256, ge=2, help="Images of a step.")
    learning_rate: float = setting(0.1, gt=0, help="Learning rate for a batch of 256, in proportion to it; it falls to 0.")
    weight_decay: float = setting(0.0, ge=0, help="Weight decay.")


class LinearSgd(EvaluationProtocol):
    """The share of test images that a linear classifier, trained by SGD on random crops, gets right."""

    name, title = "linear_sgd", "linear probe by SGD"
    Settings = LinearSgdSettings
    collective = True
    uses_head = True
    own: LinearSgdSettings

    def run(self, subject: Subject) -> dict[str, float]:
        model, place = subject.parts()
        assert subject.head is not None
        batch = min(self.own.batch, len(subject.bank))
        rate = self.own.learning_rate * batch / 256
        schedule = Schedule(self.own.epochs, rate, self.own.weight_decay, batch, cosine=True)
        classifier = Classifier(model, subject.head, model.evaluated_route)
        trained = fit(classifier, subject, schedule, cross_entropy, "linear probe", whole=False)
        found = accuracy(trained, subject, subject.queries, place.config.data.test_split, "linear probe")
        return accuracy_metrics(found, len(subject.queries))

    def describe(self, settings: Mapping[str, Any]) -> str:
        return f"a linear classifier of frozen features, {settings['epochs']} epochs of SGD on random crops of the train images"
