"""Accuracy under attack: a linear or fine-tuned classifier on the encoder, against FGSM, PGD and AutoAttack.

# n images of a batch, N attacked images, C classes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from clae_dist.config.method import Route
from clae_dist.config.rules import Section, setting
from clae_dist.errors import ConfigError
from clae_dist.evaluation.attack import Norm, attack, autoattack, import_autoattack, is_right
from clae_dist.evaluation.classifier import Classifier, along, has_routes, own_classifier
from clae_dist.evaluation.interval import accuracy_metrics
from clae_dist.evaluation.place import evenly
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject
from clae_dist.evaluation.tuning import HEADS, Head, tuned
from clae_dist.runs.checkpoint.safetensors_file import weights_digest
from clae_dist.wording import count_of

ATTACKS = ("fgsm", "pgd", "autoattack")  # from weak to strong
_GUESS_STEPS = 10  # of the attack that tells which batches AutoAttack will take long for


@dataclass(frozen=True)
class RobustSettings(Section, prefix="robust"):
    """Settings of the attacks and of the classifiers that are attacked."""

    heads: tuple[str, ...] = setting(
        ("slf",),
        help="Attacked classifiers: slf (linear, trained on clean images), alf (linear, trained on attacked images), aff (all "
        "weights, by TRADES), own (that of a run of clae finetune).",
    )
    attacks: tuple[str, ...] = setting(
        ATTACKS, help="fgsm, pgd and autoattack (the standard version; per image that stands it 7,000 passes)."
    )
    norms: tuple[str, ...] = setting(("linf",), help="Norms of the attacks: linf, l2.")
    epsilon: float = setting(8 / 255, gt=0, help="Largest change of a pixel in [0, 1], under linf.")
    epsilon_l2: float = setting(0.5, gt=0, help="Length of the change of an image with pixels in [0, 1], under l2.")
    curve: tuple[float, ...] = setting(
        (1 / 255, 2 / 255, 4 / 255, 16 / 255), gt=0, help="Further ε of PGD under linf, for accuracy against ε; [] for none."
    )
    images: int = setting(200, ge=1, help="Test images that are attacked: equally many of each class, the same for every run.")
    steps: int = setting(20, ge=1, help="Steps of PGD, of ε/4 each, from a random start.")
    batch: int = setting(20, ge=1, help="Images of a batch; ranks share the batches, and a kill loses the verdicts of one.")
    route: Literal["auto", "clean", "adversarial"] = setting(
        "auto", help="Norm layers of the attacked classifier. auto: the adversarial ones where the encoder has them."
    )
    epochs: int = setting(25, ge=1, help="Epochs of training alf and aff; the rate falls by ten after 2/5 and 4/5 of them.")
    learning_rate: float = setting(
        0.0, ge=0, zero="the literature's", help="Learning rate of alf and aff; the literature has 0.01 and 0.1 for CIFAR-10."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("heads", HEADS), ("attacks", ATTACKS), ("norms", ("linf", "l2"))):
            values = getattr(self, name)
            strange = [value for value in values if value not in known]
            self.require(not strange and len(values) > 0, name, f"use some of {', '.join(known)}.")
            self.require(len(set(values)) == len(values), name, "name each once.")


@dataclass(frozen=True)
class Trial:
    """One attack: `name` in metrics."""

    name: str
    attack: str
    norm: Norm
    epsilon: float


class Robust(EvaluationProtocol):
    """The share of test images that a classifier gets right whatever a bounded change of their pixels."""

    name, title = "robust", "robust accuracy"
    Settings = RobustSettings
    collective = True
    uses_head = True
    own: RobustSettings

    def run(self, subject: Subject) -> dict[str, float]:
        if "autoattack" in self.own.attacks:
            import_autoattack()  # before hours of work
        metrics: dict[str, float] = {}
        for head in HEADS:
            if head in self.own.heads:
                metrics |= self._attacked(head, subject)
        return metrics

    def trials(self) -> list[Trial]:
        """All attacks, the strongest of the first norm at first: it is the headline."""
        own, epsilons = self.own, {"linf": self.own.epsilon, "l2": self.own.epsilon_l2}
        found = [
            Trial(("" if norm == "linf" else f"{norm}_") + name, name, norm, epsilons[norm])  # type: ignore[arg-type]
            for norm in own.norms
            for name in reversed(ATTACKS)
            if name in own.attacks
        ]
        return found + [Trial(f"pgd_at_{255 * e:.3g}", "pgd", "linf", e) for e in sorted(own.curve)]

    def route(self, subject: Subject) -> Route:
        """The route of the attacked classifier. Raises ConfigError for one that the encoder does not have."""
        routed = has_routes(subject.parts()[0])
        if self.own.route == "auto":
            return "adversarial" if routed else "clean"
        if self.own.route == "adversarial" and not routed:
            raise ConfigError("robust.route is 'adversarial', but the encoder has one set of norm layers; use auto.")
        return self.own.route

    def settings(self, subject: Subject) -> dict[str, Any]:
        return {**super().settings(subject), "route": self.route(subject), "images": min(self.own.images, len(subject.queries))}

    def describe(self, settings: Mapping[str, Any]) -> str:
        heads, bound = ", ".join(settings["heads"]).upper(), f"{255 * settings['epsilon']:.3g}/255"
        return (
            f"{heads} against {', '.join(settings['attacks'])} within {bound} on {settings['images']} test images, "
            f"{settings['route']} route"
        )

    def _attacked(self, head: Head, subject: Subject) -> dict[str, float]:
        own, (_, place) = self.own, subject.parts()
        subject = along(subject, self.route(subject))
        classifier = self._classifier(head, subject)
        rows = evenly(subject.queries.labels_N, own.images, 0)
        trials, parts = self.trials(), list(rows.split(own.batch))
        key = {
            "robust": [vars(trial) for trial in trials],
            "classifier": weights_digest(classifier.state_dict()),
            "images": place.manifest.digest,
            "rows": rows.tolist(),
            "batch": own.batch,
            "steps": own.steps,
        }

        def work(numbers: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
            for number, (images, labels) in zip(
                numbers, _images(classifier, subject, [parts[n] for n in numbers]), strict=True
            ):
                yield self._verdicts(classifier, images, labels, trials, number)

        def costs(missing: Sequence[int]) -> dict[int, float]:
            return self._costs(classifier, subject, parts, trials, missing)

        label = f"attacks on {head.upper()}, {subject.when}"
        if place.world.is_main:  # the first batch may take an hour
            passes = "; AutoAttack takes about 7,000 passes for each that stands it" if "autoattack" in own.attacks else ""
            place.say(f"{label}: {count_of(len(trials), 'attack')} on {count_of(len(rows), 'image')}{passes}")
        journal = place.shared(key, len(parts), work, label, own.batch, len(rows), costs=costs)
        found = [tensors for _, tensors in journal]
        return _metrics(head, {name: torch.cat([one[name] for one in found]) for name in found[0]}, trials)

    def _classifier(self, head: Head, subject: Subject) -> Classifier:
        model, _ = subject.parts()
        assert subject.head is not None
        if head == "own":
            return own_classifier(subject)
        classifier = Classifier(model, subject.head, model.evaluated_route)
        return classifier if head == "slf" else tuned(head, classifier, subject, self.own.epochs, self.own.learning_rate)

    def _costs(
        self,
        classifier: Classifier,
        subject: Subject,
        parts: Sequence[torch.Tensor],
        trials: Sequence[Trial],
        missing: Sequence[int],
    ) -> dict[int, float]:
        """A guess at the time of AutoAttack for each missing batch: the images that stand a short attack. Collective."""
        world = subject.parts()[1].world
        trial = next((trial for trial in trials if trial.attack == "autoattack"), None)
        if trial is None:
            return {}
        mine, found = missing[world.rank :: world.size], {}
        for number, (images, labels) in zip(mine, _images(classifier, subject, [parts[n] for n in mine]), strict=True):
            moved, _ = attack(classifier, images, labels, trial.epsilon, trial.norm, _GUESS_STEPS, trial.epsilon / 4, None)
            found[number] = float(is_right(classifier, moved, labels).sum())
        return {number: cost for share in world.gather_objects(found) for number, cost in share.items()}

    def _verdicts(
        self, classifier: Classifier, images: torch.Tensor, labels: torch.Tensor, trials: list[Trial], number: int
    ) -> dict[str, torch.Tensor]:
        """Verdicts (n,) of one batch: right when clean, right after each attack too; and whether a gradient was zero."""
        found: dict[str, torch.Tensor] = {"clean": is_right(classifier, images, labels)}
        warned = False
        for parameter in classifier.parameters():
            parameter.requires_grad_(False)
        for trial in trials:
            if trial.attack == "autoattack":
                classes = classifier.weight.shape[1]
                verdict, warnings = autoattack(classifier, images, labels, trial.epsilon, trial.norm, classes, number)
                warned = warned or _is_masked(warnings)
            else:
                noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(number)).to(images)
                steps, start = (1, None) if trial.attack == "fgsm" else (self.own.steps, noise)
                length = trial.epsilon * (1 if trial.attack == "fgsm" else 0.25)
                moved, zero = attack(classifier, images, labels, trial.epsilon, trial.norm, steps, length, start)
                verdict = is_right(classifier, moved, labels) & found["clean"]
                found["zero_gradient"] = found.get("zero_gradient", zero) | zero
            found[trial.name] = verdict
        found["warned"] = torch.full_like(found["clean"], warned)
        return {name: value.cpu() for name, value in found.items()}


def _images(
    classifier: Classifier, subject: Subject, parts: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pixels and labels of some batches of rows of the test images."""
    place = subject.parts()[1]
    lists = [subject.queries.ids_N[rows].numpy() for rows in parts]
    for rows, views in zip(parts, place.images(place.config.data.test_split).lists(lists), strict=True):
        images = place.pixels(views.views, classifier.model)
        yield images, subject.queries.labels_N[rows].to(images.device)


def _is_masked(warnings: list[str]) -> bool:
    """True if AutoAttack says that its result may be too high."""
    return any(word in text for text in warnings for word in ("zero gradient", "Square Attack has decreased", "randomized"))


def _metrics(head: Head, verdicts: Mapping[str, torch.Tensor], trials: list[Trial]) -> dict[str, float]:
    """Percentages, the headline first; `…_masked` is 1 if the robust accuracy may come from gradients that are hidden."""
    metrics: dict[str, float] = {}
    for name in (*(trial.name for trial in trials), "clean"):
        percent = 100 * float(verdicts[name].double().mean())
        for metric, value in accuracy_metrics(percent, len(verdicts[name])).items():
            metrics[f"{head}_{name}{metric.removeprefix('accuracy')}"] = value
    zero = 100 * float(verdicts["zero_gradient"].double().mean()) if "zero_gradient" in verdicts else 0.0
    metrics[f"{head}_zero_gradient"] = zero
    metrics[f"{head}_masked"] = float(zero > 0 or bool(verdicts["warned"].any()))
    return metrics
