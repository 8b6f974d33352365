"""Instance discrimination across views, in one direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clae_dist.objectives.form import objective

if TYPE_CHECKING:
    import torch


@objective(columns="other view")
def instance(pos_A: torch.Tensor, lse_AS: torch.Tensor, num_negatives: int, settings: Any) -> torch.Tensor:
    """-log of the positive's share of the softmax over the rows of the other view.

    Reference: Ho & Vasconcelos 2020, Contrastive learning with adversarial examples ("Plain").
    """
    return pos_A.logaddexp(lse_AS[:, 0]) - pos_A
