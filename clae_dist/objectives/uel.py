"""Unsupervised embedding learning (UEL): instance discrimination in which no negative may take the anchor's place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clae_dist.objectives.form import pair_objective

if TYPE_CHECKING:
    import torch

_LEAST = 1e-12  # of 1 - p: a negative with all the mass would have an infinite loss


@pair_objective()
def uel(log_p: torch.Tensor, settings: Any) -> torch.Tensor:
    """-log(1 - p) of each negative, besides the positive's -log p.

    Reference: Ye et al. 2019, Unsupervised embedding learning via invariant and spreading instance feature, equation 6; Ho &
    Vasconcelos 2020, Contrastive learning with adversarial examples ("UEL").
    """
    return -(-log_p.expm1()).clamp(min=_LEAST).log()
