"""Rows across ranks, and the objective on all of them. The gradient contract lives here.

1. Every rank holds the same number of rows.
2. Each rank's loss is the mean over its own anchors against all rows (objectives.py).
3. The gradient of a row is summed over ranks, since every rank's anchors used it; the parallel backend averages over ranks.
   Then every parameter gradient is the single-process gradient of the global batch's mean loss.
4. The gradient with respect to an *input* arrives multiplied by the number of ranks: no backend has averaged it.
5. The attack uses torch.autograd.grad with respect to the input alone (adversary.py).

Two implementations of point 3, which is all that differs:
   reduce_scatter  the backward of the gather sums what all ranks say of a row. For any objective.
   log_sum_exp     every rank knows all rows; with one number a row, the others' log-sum-exp, it computes by itself what they
                   would have said (log_sum_exp.py). No traffic on the way back.

A wrong gather is invisible in the forward loss; tests/contrast/test_parity.py compares gradients.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist

from clae_dist import collectives
from clae_dist.config import ConfigError
from clae_dist.contrast.log_sum_exp import LOG_SUM_EXP, all_rows
from clae_dist.contrast.objectives import OBJECTIVES, Rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(rows_BD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return all_rows(rows_BD, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad_ND,) = grads
        # Row k of rank r was used by every rank's anchors: its gradient is the sum of what all of them say.
        grad_BD = grad_ND.new_empty((grad_ND.shape[0] // dist.get_world_size(ctx.group), *grad_ND.shape[1:]))
        collectives.reduce_scatter(grad_BD, grad_ND.contiguous(), ctx.group)
        return grad_BD, None


def gather_rows(rows_BD: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(B, …) on each of W ranks to (W·B, …) on all of them, in the order of ranks; gradients are summed over ranks.

    A collective in forward and in backward: every rank must call both. Without a group it is the identity.
    """
    return rows_BD if group is None else _GatherRows.apply(rows_BD, group)


class Contrast:
    """An objective on the rows of all ranks. `gather` as in config.Objective; "auto" knows which objectives have which form.

    Gather a view's rows once, with `rows`, and use them in as many losses as there are. With log_sum_exp, a loss must have
    the same weight on every rank.
    """

    def __init__(self, objective: str, temperature: float, world: Any, gather: str = "auto", chunk: int = 0) -> None:
        self.gather = ("log_sum_exp" if objective in LOG_SUM_EXP else "reduce_scatter") if gather == "auto" else gather
        if self.gather == "log_sum_exp" and objective not in LOG_SUM_EXP:
            raise ConfigError(
                f"objective.gather is 'log_sum_exp', a form that objective.name {objective!r} does not have (log_sum_exp.py); "
                "use auto or reduce_scatter."
            )
        self._objective, self._temperature, self._chunk = objective, temperature, chunk
        self._rank, self._group = world.rank, world.group

    def of_this_rank_alone(self) -> Contrast:
        """The same without the negatives of other ranks: what local negatives would make of it."""
        alone = copy.copy(self)
        alone._rank, alone._group = 0, None
        return alone

    def rows(self, mine_BD: torch.Tensor) -> Rows:
        """A collective: this rank's rows and everybody's."""
        if self._group is None:
            return Rows(mine_BD, mine_BD)
        if self.gather == "log_sum_exp":
            return Rows(mine_BD, all_rows(mine_BD.detach(), self._group))
        return Rows(mine_BD, gather_rows(mine_BD, self._group))

    def __call__(self, a: Rows, b: Rows) -> torch.Tensor:
        """This rank's share of the loss: the mean over its anchors. With log_sum_exp a collective."""
        start = self._rank * len(a.mine)
        if self.gather == "log_sum_exp":
            return LOG_SUM_EXP[self._objective](a, b, start, self._temperature, self._chunk, self._group)
        return OBJECTIVES[self._objective](a, b, start, self._temperature, self._chunk)
