"""Contrastive learning with hard negatives (HCL): the debiased objective with negatives weighted by their similarity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from clae_dist.objectives.debiased import corrected
from clae_dist.objectives.form import objective

if TYPE_CHECKING:
    import torch


@objective(scales=lambda settings: (1 + settings.beta, settings.beta), signs=(1, -1), uses=("beta", "tau_plus"))
def hard(pos_A: torch.Tensor, lse_AS: torch.Tensor, num_negatives: int, settings: Any) -> torch.Tensor:
    """`debiased` with the negatives' sum replaced by n sum exp((1 + beta) s) / sum exp(beta s); the weights have gradient.

    Reference: Robinson et al. 2021, Contrastive learning with hard negative samples, equation 4.
    """
    weighted_A = math.log(num_negatives) + lse_AS[:, 0] - lse_AS[:, 1]
    rest_A = corrected(pos_A, weighted_A, num_negatives, settings.tau_plus, settings.temperature)
    return pos_A.logaddexp(rest_A) - pos_A
