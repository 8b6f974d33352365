"""Decoupled contrastive learning. Not the debiased objective, which other papers abbreviate to the same letters, DCL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clae_dist.objectives.form import objective

if TYPE_CHECKING:
    import torch


@objective()
def decoupled(pos_A: torch.Tensor, lse_AS: torch.Tensor, num_negatives: int, settings: Any) -> torch.Tensor:
    """NT-Xent without the positive in the denominator.

    Reference: Yeh et al. 2022, Decoupled contrastive learning, equation 6.
    """
    return lse_AS[:, 0] - pos_A
