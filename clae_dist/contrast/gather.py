"""Rows across ranks, differentiable. The gradient contract lives here.

1. Every rank holds the same number of rows.
2. Each rank's loss is the mean over its own anchors against all rows (objectives.py).
3. The backward of the gather sums over ranks; the parallel backend averages over ranks. Then every parameter gradient is
   the single-process gradient of the global batch's mean loss.
4. The gradient with respect to an *input* arrives multiplied by the number of ranks: no backend has averaged it.
5. The attack uses torch.autograd.grad with respect to the input alone (adversary.py).

A wrong gather is invisible in the forward loss; tests/contrast/test_parity.py compares gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(rows_BD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        all_ND = rows_BD.new_empty((dist.get_world_size(group) * rows_BD.shape[0], *rows_BD.shape[1:]))
        dist.all_gather_into_tensor(all_ND, rows_BD.contiguous(), group=group)
        return all_ND

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad_ND,) = grads
        # Row k of rank r was used by every rank's anchors: its gradient is the sum of what all of them say.
        grad_BD = grad_ND.new_empty((grad_ND.shape[0] // dist.get_world_size(ctx.group), *grad_ND.shape[1:]))
        dist.reduce_scatter_tensor(grad_BD, grad_ND.contiguous(), group=ctx.group)
        return grad_BD, None


def gather_rows(rows_BD: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(B, …) on each of W ranks to (W·B, …) on all of them, in the order of ranks; gradients are summed over ranks.

    A collective in forward and in backward: every rank must call both. Without a group it is the identity.
    """
    return rows_BD if group is None else _GatherRows.apply(rows_BD, group)


def contrast_on_global_batch(
    objective: Any, a_BD: torch.Tensor, b_BD: torch.Tensor, temperature: float, world: Any
) -> torch.Tensor:
    """This rank's share of `objective` (objectives.py) with the negatives of all ranks of `world`."""
    pair_N2D = gather_rows(torch.stack([a_BD, b_BD], dim=1), world.group)
    return objective(a_BD, b_BD, pair_N2D[:, 0], pair_N2D[:, 1], world.rank * a_BD.shape[0], temperature)
