"""The debiased contrastive objective: NT-Xent corrected for negatives that are of the anchor's class."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from clae_dist.objectives.form import objective

if TYPE_CHECKING:
    import torch


@objective(uses=("tau_plus",))
def debiased(pos_A: torch.Tensor, lse_AS: torch.Tensor, num_negatives: int, settings: Any) -> torch.Tensor:
    """NT-Xent in which `corrected` stands for the sum over negatives.

    Reference: Chuang et al. 2020, Debiased contrastive learning, equation 8.
    """
    return pos_A.logaddexp(corrected(pos_A, lse_AS[:, 0], num_negatives, settings.tau_plus, settings.temperature)) - pos_A


def corrected(
    pos_A: torch.Tensor, lse_A: torch.Tensor, num_negatives: int, tau_plus: float, temperature: float
) -> torch.Tensor:
    """log max{(R - tau_plus n P) / (1 - tau_plus), n exp(-1 / temperature)}, where R = exp(lse), P = exp(pos), n negatives.

    Where the second of the two is larger, the gradient is exactly 0.
    """
    log_1_minus = math.log1p(-tau_plus)
    log_n = math.log(num_negatives)
    floor = log_n - 1 / temperature
    log_tau_plus = math.log(tau_plus) if tau_plus else -math.inf
    share_A = log_tau_plus + log_n + pos_A - lse_A  # log(tau_plus n P / R)
    # Where R is the smaller, a constant takes the place of the logarithm of a negative number, whose gradient would be NaN.
    above_A = share_A < 0
    rest_A = lse_A + (-share_A.where(above_A, -1.0).expm1()).log() - log_1_minus
    return rest_A.where(above_A & (rest_A > floor), floor)
