"""Implicit feature modification (IFM): NT-Xent mixed with itself after an adversarial step on the embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clae_dist.objectives.form import objective

if TYPE_CHECKING:
    import torch


@objective(uses=("margin", "mix"))
def ifm(pos_A: torch.Tensor, lse_AS: torch.Tensor, num_negatives: int, settings: Any) -> torch.Tensor:
    """(1 - mix) NT-Xent + mix NT-Xent with the positive's cosine lowered and the negatives' cosines raised by `margin`.

    Reference: Robinson et al. 2021, Can contrastive learning avoid shortcut solutions?, equation 5.
    """
    lse_A, shift = lse_AS[:, 0], settings.margin / settings.temperature
    plain_A = pos_A.logaddexp(lse_A) - pos_A
    modified_A = (pos_A - shift).logaddexp(lse_A + shift) - (pos_A - shift)
    return (1 - settings.mix) * plain_A + settings.mix * modified_A
