"""Linear probe: multinomial logistic regression on frozen, standardised features.

# N rows, F width of the features, C classes
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from clae_dist.evaluation.features import Features
from clae_dist.evaluation.interval import accuracy_metrics
from clae_dist.evaluation.knn import require_labels
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # from strong to weak: each fit starts where the one before ended
HELD_OUT = 0.1  # of the train split


@dataclass(frozen=True)
class Probe:
    """`accuracy` in percent on the test split, and the penalty that the held-out tenth of train chose."""

    accuracy: float
    penalty: float
    held_out_accuracy: float | None  # percent; None: the penalty was given


@dataclass(frozen=True)
class _Head:
    weight: torch.Tensor
    bias: torch.Tensor

    def accuracy(self, x_NF: torch.Tensor, y_N: torch.Tensor) -> float:
        return 100 * float(((x_NF @ self.weight + self.bias).argmax(dim=1) == y_N).double().mean())


def linear_probe(
    train: Features,
    test: Features,
    iterations: int = 100,
    penalty: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Probe:
    """Percent of the test split that a linear classifier on the train split's features gets right.

    Features are standardised with the train split's mean and deviation. The loss is the mean cross entropy plus
    penalty/2 · ‖weights‖², a convex problem that L-BFGS solves in at most `iterations` steps, without a learning rate.
    Penalty 0 takes the best of PENALTIES on a tenth of *train* held out, and then fits all of train; the test split is
    used once, at the end. `seed` chooses that tenth. Raises DataError for sets without labels.
    """
    require_labels("train", train)
    require_labels("test", test)
    mean_F, std_F = train.features_NF.mean(dim=0), train.features_NF.std(dim=0, correction=0)
    scale_F = torch.where(std_F > 1e-6, 1 / std_F.clamp_min(1e-6), 0.0)  # a constant feature has no information
    x_NF, test_NF = (((part.features_NF - mean_F) * scale_F).to(device) for part in (train, test))
    axes_FF = _principal_axes(x_NF)
    x_NF, test_NF = x_NF @ axes_FF, test_NF @ axes_FF
    y_N = train.labels_N.to(device)
    num_classes = 1 + int(max(train.labels_N.max(), test.labels_N.max()))
    blank = _Head(x_NF.new_zeros((x_NF.shape[1], num_classes)), x_NF.new_zeros(num_classes))
    held_out_accuracy = None
    if not penalty:
        penalty, held_out_accuracy = _choose_penalty(x_NF, y_N, blank, iterations, seed)
    head = _fit(x_NF, y_N, blank, penalty, iterations)
    return Probe(head.accuracy(test_NF, test.labels_N.to(device)), penalty, held_out_accuracy)


def _choose_penalty(x_NF: torch.Tensor, y_N: torch.Tensor, head: _Head, iterations: int, seed: int) -> tuple[float, float]:
    """The penalty with the best accuracy on a tenth held out, the strongest of equals, and that accuracy in percent."""
    order_N = torch.randperm(len(y_N), generator=torch.Generator().manual_seed(seed)).to(y_N.device)
    num_held = min(max(1, round(HELD_OUT * len(y_N))), len(y_N) - 1)
    held, kept = order_N[:num_held], order_N[num_held:]
    if not len(kept):  # a single image: nothing to choose by
        return PENALTIES[0], float("nan")
    x_kept, y_kept, x_held, y_held = x_NF[kept], y_N[kept], x_NF[held], y_N[held]
    scores = []
    for penalty in PENALTIES:
        head = _fit(x_kept, y_kept, head, penalty, iterations)
        scores.append(head.accuracy(x_held, y_held))
    return PENALTIES[scores.index(max(scores))], max(scores)


def _principal_axes(x_NF: torch.Tensor) -> torch.Tensor:
    """(F, F) orthonormal: turned onto them, the features are uncorrelated, and the same problem is solved in fewer steps."""
    width = x_NF.shape[1]
    covariance_FF = torch.zeros((width, width), dtype=torch.float64, device=x_NF.device)
    for rows_nF in x_NF.split(65_536):  # a double-precision copy of all of ImageNet's features would not fit
        rows_nF = rows_nF.double()
        covariance_FF += rows_nF.T @ rows_nF / len(x_NF)
    return torch.linalg.eigh(covariance_FF).eigenvectors.to(x_NF.dtype)


def _fit(x_NF: torch.Tensor, y_N: torch.Tensor, start: _Head, penalty: float, iterations: int) -> _Head:
    """L-BFGS in weights scaled by the root of a bound-like estimate of the curvature (Boehning 1992) along each feature."""
    curvature_F = x_NF.square().mean(dim=0) / len(start.bias) + penalty
    scale_F1 = curvature_F.rsqrt()[:, None]
    scaled_FC = (start.weight / scale_F1).requires_grad_()
    bias_C = start.bias.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [scaled_FC, bias_C], max_iter=iterations, tolerance_grad=1e-5, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )

    def loss_with_gradients() -> torch.Tensor:
        optimiser.zero_grad()
        with torch.enable_grad():
            weight_FC = scale_F1 * scaled_FC
            loss = F.cross_entropy(x_NF @ weight_FC + bias_C, y_N) + penalty / 2 * weight_FC.square().sum()
            loss.backward()
        return loss

    optimiser.step(loss_with_gradients)
    return _Head(scale_F1 * scaled_FC.detach(), bias_C.detach())


class LinearProbe(EvaluationProtocol):
    """The share of test images that a linear classifier on the train split's features gets right."""

    name, title = "linear", "linear probe"

    def run(self, subject: Subject) -> dict[str, float]:
        iterations, penalty = subject.settings.linear_iterations, subject.settings.linear_penalty
        probe = linear_probe(subject.bank, subject.queries, iterations, penalty, subject.seed, subject.device)
        metrics = {**accuracy_metrics(probe.accuracy, len(subject.queries)), "penalty": probe.penalty}
        if probe.held_out_accuracy is not None and math.isfinite(probe.held_out_accuracy):
            metrics["held_out_accuracy"] = probe.held_out_accuracy
        return metrics

    def settings(self, subject: Subject) -> dict[str, float]:
        return {"iterations": subject.settings.linear_iterations, "penalty": subject.settings.linear_penalty}

    def describe(self, settings: Mapping[str, float]) -> str:
        chosen = "chosen on a held-out tenth of them" if not settings["penalty"] else f"{settings['penalty']:g}"
        return f"logistic regression on the same train images with L2 penalty {chosen}"
