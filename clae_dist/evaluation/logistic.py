"""Multinomial logistic regression with an L2 penalty: a quasi-Newton method that reads the features once a step.

# N rows, F width of the features, C classes, K principal axes with variance (at most F)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

_ROWS = 2048  # of logits at once: features and logits of a block stay in the processor's cache
_BLOCK = 65_536  # rows of the covariance at once
_MEMORY = 12  # pairs of the L-BFGS matrix


@dataclass(frozen=True)
class Solution:
    """Weights (F, C), bias (C,), and the number of passes over the features that they took."""

    weight: torch.Tensor
    bias: torch.Tensor
    passes: int


@dataclass(frozen=True)
class Axes:
    """Orthonormal principal axes (F, K) of features and the variance (K,) along each, float64."""

    axes_FK: torch.Tensor  # noqa: N815 - dimensions
    variance_K: torch.Tensor  # noqa: N815


def principal_axes(x_NF: torch.Tensor) -> Axes:
    """Axes along which centred features are uncorrelated; those without variance are dropped."""
    covariance_FF = torch.zeros((x_NF.shape[1],) * 2, dtype=torch.float64, device=x_NF.device)
    for rows_nF in x_NF.split(_BLOCK):
        covariance_FF += (rows_nF.T @ rows_nF).double() / len(x_NF)
    variance_F, axes_FF = (part.to(x_NF.device) for part in torch.linalg.eigh(covariance_FF.cpu()))
    kept_F = variance_F > 1e-9 * variance_F[-1].clamp_min(1e-300)
    return Axes(axes_FF[:, kept_F], variance_F[kept_F])


class _Problem:
    """Mean cross entropy + penalty/2 · ‖weights‖², in weights along principal axes that are scaled to a curvature of about 1.

    The scale is Boehning's bound at equal probabilities (1992). Parameters are (K + 1, C), float64, the bias last.
    """

    def __init__(self, x_NF: torch.Tensor, y_N: torch.Tensor, axes: Axes, classes: int, penalty: float) -> None:
        self._x_NF, self._y_N, self._penalty = x_NF, y_N, penalty
        self._scale_K1 = (axes.variance_K / classes + penalty).rsqrt()[:, None]
        self._axes_FK, self._bias_scale = axes.axes_FK, classes**0.5
        self.passes = 0

    def parameters(self, weight_FC: torch.Tensor, bias_C: torch.Tensor) -> torch.Tensor:
        scaled_KC = (self._axes_FK.T @ weight_FC.double()) / self._scale_K1
        return torch.cat([scaled_KC, bias_C.double()[None] / self._bias_scale])

    def weights(self, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight_FC = self._axes_FK @ (self._scale_K1 * parameters[:-1])
        return weight_FC.to(self._x_NF.dtype), (self._bias_scale * parameters[-1]).to(self._x_NF.dtype)

    def loss_and_gradient(self, parameters: torch.Tensor) -> tuple[float, torch.Tensor]:
        """One pass over the features: each block gives its logits, and the gradient from them."""
        self.passes += 1
        weight_FC, bias_C = self.weights(parameters)
        weight_CF = weight_FC.T.contiguous()  # products with the features as they lie in memory: three times as fast
        gradient_CF, gradient_C = torch.zeros_like(weight_CF), torch.zeros_like(parameters[-1])
        loss = torch.zeros((), dtype=torch.float64, device=weight_FC.device)
        for x_nF, y_n in zip(self._x_NF.split(_ROWS), self._y_N.split(_ROWS), strict=True):
            log_p_nC = F.linear(x_nF, weight_CF, bias_C).log_softmax(1)
            loss -= log_p_nC.gather(1, y_n[:, None]).sum()
            residual_nC = log_p_nC.exp_()
            residual_nC.scatter_add_(1, y_n[:, None], residual_nC.new_full((len(y_n), 1), -1.0))
            gradient_CF.addmm_(residual_nC.T, x_nF)
            gradient_C += residual_nC.sum(0)
        weight_KC = self._scale_K1 * parameters[:-1]
        count = len(self._x_NF)
        scaled_KC = self._scale_K1 * (self._axes_FK.T @ gradient_CF.T.double() / count + self._penalty * weight_KC)
        gradient = torch.cat([scaled_KC, self._bias_scale * gradient_C[None] / count])
        return float(loss) / count + self._penalty / 2 * float(weight_KC.square().sum()), gradient


def solve(
    x_NF: torch.Tensor,
    y_N: torch.Tensor,
    axes: Axes,
    start: tuple[torch.Tensor, torch.Tensor],
    penalty: float,
    iterations: int,
    tolerance: float,
) -> Solution:
    """Minimise from `start` (weights (F, C), bias (C,)) by L-BFGS (Nocedal 1980) with backtracking.

    Args:
        x_NF: centred features, whose principal axes are `axes` (or about so: of a larger set that these are a part of).
        tolerance: it stops when a step promises to lower the loss by less, in nats.
    """
    problem = _Problem(x_NF, y_N, axes, start[0].shape[1], penalty)
    point = problem.parameters(*start)
    loss, gradient = problem.loss_and_gradient(point)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(iterations):
        direction = _direction(gradient, pairs)
        promise = -float((gradient * direction).sum()) / 2  # of a quadratic: the loss above its minimum
        if promise < tolerance:
            break
        step = 1.0
        for _ in range(20):
            candidate = point + step * direction
            new_loss, new_gradient = problem.loss_and_gradient(candidate)
            if new_loss <= loss - 1e-4 * step * 2 * promise:
                break
            step *= 0.4
        else:
            break  # the loss cannot be lowered in this precision
        moved, turned = candidate - point, new_gradient - gradient
        if float((moved * turned).sum()) > 1e-10 * float(moved.norm() * turned.norm()):
            pairs = [*pairs[-_MEMORY + 1 :], (moved, turned)]
        point, loss, gradient = candidate, new_loss, new_gradient
    return Solution(*problem.weights(point), problem.passes)


def _direction(gradient: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Minus the gradient times the inverse curvature that the pairs (moved, turned) show: the two-loop recursion."""
    direction = -gradient
    factors = []
    for moved, turned in reversed(pairs):
        factor = (moved * direction).sum() / (moved * turned).sum()
        factors.append(factor)
        direction = direction - factor * turned
    if pairs:
        moved, turned = pairs[-1]
        direction = direction * ((moved * turned).sum() / turned.square().sum())
    for (moved, turned), factor in zip(pairs, reversed(factors), strict=True):
        direction = direction + moved * (factor - (turned * direction).sum() / (moved * turned).sum())
    return direction
