"""Objectives of the form PerPair, computed in column chunks. No ranks, no collectives.

# B rows on this rank, N rows on all ranks, D embedding width. g is the function of a negative's log p, g' its slope.

With G_k the sum of g' over the negatives of anchor k, the derivative of k's loss with respect to s_kl is p_l (1 - G_k) + g'_l
for a negative l and p_+ (1 - G_k) - 1 for the positive. The sums of p_l z_l and of g'_l z_l are collected apart, so that one
pass gives both the loss and its gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from clae_dist.objectives.form import PerPair, Rows
from clae_dist.objectives.softmax import at_least_float32, chunk_size, log_sum_exps, similarities


def per_pair_loss(objective: PerPair, a: Rows, b: Rows, start: int, settings: Any) -> torch.Tensor:
    """The mean over this rank's anchors, of both views; `all` of a and b, and positives, are constants."""
    columns = (a.all.detach(), b.all.detach())
    halves = [
        _PerPairLoss.apply(anchors.mine, positives.mine.detach(), *columns, objective, start, settings)
        for anchors, positives in ((a, b), (b, a))
    ]
    mean: torch.Tensor = torch.stack(halves).mean()
    return mean


class _PerPairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        rows, (objective, start, settings) = inputs[:4], inputs[4:]
        z_BD, positives_BD, *blocks = map(at_least_float32, rows)
        chunk = chunk_size(z_BD, settings.chunk)
        pos_B = (z_BD * positives_BD).sum(1) / settings.temperature
        # Each block excludes one column of an anchor: its own row in one, its positive in the other.
        lse_BS = log_sum_exps(z_BD, blocks, settings.temperature, (1.0,), start, chunk)
        lse_B = pos_B.logaddexp(lse_BS[:, 0])
        loss_B, slope_B = lse_B - pos_B, torch.zeros_like(pos_B)
        mean_BD, pull_BD = torch.zeros_like(z_BD), torch.zeros_like(z_BD)
        for block in blocks:
            for columns, s_BCM in similarities(z_BD, [block], settings.temperature, start, chunk):
                log_p = s_BCM[:, 0].sub_(lse_B[:, None]).detach().requires_grad_()
                with torch.enable_grad():
                    sums_B = objective.function(log_p, settings).sum(1)
                    (slopes,) = torch.autograd.grad(sums_B.sum(), log_p)
                loss_B += sums_B.detach()
                if ctx.needs_input_grad[0]:
                    slope_B += slopes.sum(1)
                    pull_BD.addmm_(slopes, block[columns])
                    mean_BD.addmm_(log_p.detach().exp(), block[columns])
        if ctx.needs_input_grad[0]:
            share_B = (pos_B - lse_B).exp() * (1 - slope_B) - 1
            grad_BD = pull_BD.addcmul_(mean_BD, (1 - slope_B)[:, None]).addcmul_(positives_BD, share_B[:, None])
            ctx.save_for_backward(grad_BD.div_(settings.temperature * len(z_BD)).to(rows[0].dtype))
        return loss_B.mean()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad_BD,) = ctx.saved_tensors
        return grad_BD * grads[0].to(grad_BD.dtype), None, None, None, None, None, None
