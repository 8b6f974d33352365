"""NT-Xent, the normalised temperature-scaled cross-entropy of SimCLR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clae_dist.objectives.form import objective

if TYPE_CHECKING:
    import torch


@objective()
def nt_xent(pos_A: torch.Tensor, lse_AS: torch.Tensor, num_negatives: int, settings: Any) -> torch.Tensor:
    """-log of the positive's share of the softmax over the positive and all negatives.

    Reference: Chen et al. 2020, A simple framework for contrastive learning of visual representations, equation 1.
    """
    return pos_A.logaddexp(lse_AS[:, 0]) - pos_A
