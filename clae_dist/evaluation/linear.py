"""Linear probe: multinomial logistic regression on frozen, standardised features.

# N rows, F width of the features, C classes
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from clae_dist.evaluation.features import Features
from clae_dist.evaluation.interval import accuracy_metrics
from clae_dist.evaluation.knn import require_labels
from clae_dist.evaluation.logistic import Axes, principal_axes, solve
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # from strong to weak: each fit starts where the one before ended
HELD_OUT = 0.1  # of the train split
_TOLERANCE, _SEARCH_TOLERANCE = 1e-5, 1e-4  # nats above the minimum; the choice of a penalty does not need its exact fit
_ROWS = 65_536  # whose logits or double-precision copy are in memory at once: of all of ImageNet's they would not fit


@dataclass(frozen=True)
class Probe:
    """`accuracy` in percent on the test split, and the penalty that the held-out tenth of train chose."""

    accuracy: float
    penalty: float
    held_out_accuracy: float | None  # percent; None: the penalty was given


@dataclass(frozen=True)
class LinearHead:
    """An affine classifier of features as they are: weight (F, C), bias (C,)."""

    weight: torch.Tensor
    bias: torch.Tensor
    penalty: float = 0.0
    held_out_accuracy: float | None = None

    def logits(self, features_NF: torch.Tensor) -> torch.Tensor:
        """Logits (N, C) of features (N, F); differentiable."""
        return features_NF @ self.weight.to(features_NF) + self.bias.to(features_NF)

    def accuracy(self, x_NF: torch.Tensor, y_N: torch.Tensor) -> float:
        parts = zip(x_NF.split(_ROWS), y_N.split(_ROWS), strict=True)
        right = sum(int((self.logits(x).argmax(dim=1) == y).sum()) for x, y in parts)
        return 100 * right / len(y_N)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The head for storage; `from_tensors` reads it."""
        held_out = math.nan if self.held_out_accuracy is None else self.held_out_accuracy
        chosen = torch.tensor([self.penalty, held_out], dtype=torch.float64)
        return {"weight": self.weight, "bias": self.bias, "chosen": chosen}

    @staticmethod
    def from_tensors(tensors: Mapping[str, torch.Tensor]) -> LinearHead:
        penalty, held_out = tensors["chosen"].tolist()
        return LinearHead(tensors["weight"], tensors["bias"], penalty, None if math.isnan(held_out) else held_out)


def fit_head(
    train: Features,
    num_classes: int,
    iterations: int = 100,
    penalty: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> LinearHead:
    """The linear classifier of the train split's features, on the CPU.

    Features are standardised with the train split's mean and deviation, which the head has in its weights. The loss is the mean
    cross entropy plus penalty/2 · ‖weights‖² of standardised features, a convex problem that L-BFGS solves in at most
    `iterations` steps, without a learning rate. Penalty 0 takes the best of PENALTIES on a tenth of *train* held out, and then
    fits all of train. `seed` chooses that tenth. Raises DataError for sets without labels.
    """
    require_labels("train", train)
    mean_F, std_F = train.features_NF.mean(dim=0), train.features_NF.std(dim=0, correction=0)
    scale_F = torch.where(std_F > 1e-6, 1 / std_F.clamp_min(1e-6), 0.0)  # a constant feature has no information
    order_N = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    x_NF = torch.empty((len(train), len(mean_F)), device=device)  # in that order, so that the held-out part is no copy
    for rows_n, block_nF in zip(order_N.split(_ROWS), x_NF.split(_ROWS), strict=True):
        block_nF.copy_((train.features_NF[rows_n] - mean_F) * scale_F)
    y_N = train.labels_N[order_N].to(device)
    axes = principal_axes(x_NF)
    head = LinearHead(x_NF.new_zeros((x_NF.shape[1], num_classes)), x_NF.new_zeros(num_classes))
    held_out_accuracy = None
    if not penalty:
        head, penalty, held_out_accuracy = _choose_penalty(x_NF, y_N, axes, head, iterations)
    head = _fit(x_NF, y_N, axes, head, penalty, iterations, _TOLERANCE)
    weight_FC = scale_F.double()[:, None] * head.weight.cpu().double()
    bias_C = head.bias.cpu().double() - mean_F.double() @ weight_FC
    return LinearHead(weight_FC.float(), bias_C.float(), penalty, held_out_accuracy)


def linear_probe(
    train: Features,
    test: Features,
    iterations: int = 100,
    penalty: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Probe:
    """Percent of the test split that `fit_head` gets right; the test split is used once, at the end.

    Raises DataError for sets without labels.
    """
    require_labels("train", train)
    require_labels("test", test)
    num_classes = 1 + int(max(train.labels_N.max(), test.labels_N.max()))
    head = fit_head(train, num_classes, iterations, penalty, seed, device)
    return Probe(head.accuracy(test.features_NF, test.labels_N), head.penalty, head.held_out_accuracy)


def _choose_penalty(
    x_NF: torch.Tensor, y_N: torch.Tensor, axes: Axes, head: LinearHead, iterations: int
) -> tuple[LinearHead, float, float | None]:
    """The head and the penalty with the best accuracy on the first tenth (the strongest of equals), and it in percent."""
    num_held = min(max(1, round(HELD_OUT * len(y_N))), len(y_N) - 1)
    if num_held == 0:  # a single image: nothing to choose by
        return head, PENALTIES[0], None
    best: tuple[LinearHead, float, float] | None = None
    for penalty in PENALTIES:
        head = _fit(x_NF[num_held:], y_N[num_held:], axes, head, penalty, iterations, _SEARCH_TOLERANCE)
        accuracy = head.accuracy(x_NF[:num_held], y_N[:num_held])
        if best is None or accuracy > best[2]:
            best = head, penalty, accuracy
    assert best is not None
    return best


def _fit(
    x_NF: torch.Tensor, y_N: torch.Tensor, axes: Axes, start: LinearHead, penalty: float, iterations: int, tolerance: float
) -> LinearHead:
    solution = solve(x_NF, y_N, axes, (start.weight, start.bias), penalty, iterations, tolerance)
    return LinearHead(solution.weight, solution.bias)


class LinearProbe(EvaluationProtocol):
    """The share of test images that a linear classifier on the train split's features gets right."""

    name, title = "linear", "linear probe"
    uses_head = True

    def run(self, subject: Subject) -> dict[str, float]:
        assert subject.head is not None
        accuracy = subject.head.accuracy(subject.queries.features_NF, subject.queries.labels_N)
        metrics = {**accuracy_metrics(accuracy, len(subject.queries)), "penalty": subject.head.penalty}
        if subject.head.held_out_accuracy is not None:
            metrics["held_out_accuracy"] = subject.head.held_out_accuracy
        return metrics

    def settings(self, subject: Subject) -> dict[str, Any]:
        return {"iterations": subject.settings.linear_iterations, "penalty": subject.settings.linear_penalty}

    def describe(self, settings: Mapping[str, Any]) -> str:
        chosen = "chosen on a held-out tenth of them" if not settings["penalty"] else f"{settings['penalty']:g}"
        return f"logistic regression on the same train images with L2 penalty {chosen}"
