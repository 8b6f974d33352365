"""`clae bench probe`: the linear probe beside scikit-learn's logistic regression on the same features.

# N train images, Q test images, F width of the features, C classes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from clae_dist.bench.measure import Say, UnequalError, cpu_figure, make_rows, time_in_turns
from clae_dist.bench.outcome import Outcome
from clae_dist.evaluation.features import Features
from clae_dist.evaluation.linear import HELD_OUT, PENALTIES, linear_probe
from clae_dist.versions import package_version

_POINTS = 0.5  # of accuracy, by which scikit-learn may be better: both stop before the minimum, at different places
_ITERATIONS = 100  # of both, a fit


@dataclass(frozen=True)
class ProbeBench:
    train: int = 50_000
    test: int = 10_000
    width: int = 512
    classes: int = 10
    repeats: int = 3
    penalty: float = 1e-3


FULL = ProbeBench()
QUICK = ProbeBench(train=5_000, test=2_000, width=128, repeats=2)


def bench(settings: ProbeBench, say: Say) -> Outcome:
    """Return rows for one penalty, and for the search on a tenth of train with the final fit.

    Raises UnequalError if scikit-learn's test accuracy is higher by more than half a point.
    """
    train, test = (_features(settings, count, seed) for seed, count in enumerate((settings.train, settings.test), 1))
    rows = []
    for case, penalty in (
        (f"penalty {settings.penalty:g}", settings.penalty),
        ("search over penalties, then all of train", 0.0),
    ):
        contenders: dict[str, Callable[[], float]] = {
            "clae": lambda penalty=penalty: linear_probe(train, test, _ITERATIONS, penalty).accuracy,  # type: ignore[misc]
            "scikit-learn": lambda penalty=penalty: _scikit_learn(train, test, penalty),  # type: ignore[misc]
        }
        accuracy = {name: run() for name, run in contenders.items()}
        if accuracy["scikit-learn"] > accuracy["clae"] + _POINTS:
            raise UnequalError(f"{case}: accuracies {accuracy}; the probe is worse, so its time cannot be compared.")
        say(f"{case}: {', '.join(f'{name} {value:.2f} %' for name, value in accuracy.items())}")
        times = time_in_turns(contenders, torch.device("cpu"), settings.repeats, at_least_s=0)
        figures = {
            name: {"more": {"accuracy": accuracy[name], **cpu_figure(times[name], torch.device("cpu"))}} for name in contenders
        }
        size = f"{settings.train:,} x {settings.width} features, {settings.classes} classes, {case}"
        notes = {
            "clae": "the linear probe, float32, with standardisation",
            "scikit-learn": f"{package_version('scikit-learn')}, LogisticRegression, float32, with standardisation",
        }
        rows += make_rows(size, notes, times, figures)
    return Outcome(rows, torch.device("cpu"))


def _features(settings: ProbeBench, count: int, seed: int) -> Features:
    """Correlated features with a spectrum that falls like 1/rank, as encoders have them; the classes overlap."""
    shared, generator = (torch.Generator().manual_seed(number) for number in (0, seed))
    axes_FF = torch.linalg.qr(torch.randn(settings.width, settings.width, generator=shared))[0]
    deviation_F = torch.arange(1, settings.width + 1).float() ** -0.5
    centres_CF = torch.randn(settings.classes, settings.width, generator=shared)
    labels_N = torch.randint(settings.classes, (count,), generator=generator)
    rows_NF = torch.randn(count, settings.width, generator=generator) + 2 / settings.width**0.5 * centres_CF[labels_N]
    return Features(1 + (rows_NF * deviation_F) @ axes_FF, labels_N, torch.arange(count))


def _scikit_learn(train: Features, test: Features, penalty: float) -> float:
    """The same protocol with scikit-learn: its fits start where the one before ended, as ours do."""
    from sklearn.linear_model import LogisticRegression

    mean_F, std_F = train.features_NF.mean(0), train.features_NF.std(0, correction=0)
    x, x_test = (((part.features_NF - mean_F) / std_F).numpy() for part in (train, test))
    y, y_test = train.labels_N.numpy(), test.labels_N.numpy()
    model = LogisticRegression(max_iter=_ITERATIONS, warm_start=True)
    if not penalty:
        num_held = round(HELD_OUT * len(y))
        scores = []
        for candidate in PENALTIES:
            model.set_params(C=1 / (candidate * (len(y) - num_held))).fit(x[num_held:], y[num_held:])
            scores.append(float((model.predict(x[:num_held]) == y[:num_held]).mean()))
        penalty = PENALTIES[scores.index(max(scores))]
    model.set_params(C=1 / (penalty * len(y))).fit(x, y)
    return 100 * float((model.predict(x_test) == y_test).mean())
