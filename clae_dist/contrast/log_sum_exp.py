"""The objectives once more, with one number a row in the place of a reduce-scatter.

# B rows on this rank, N on all, D embedding width. M = 2N. s(k, l) = z_k · z_l / τ, lse_k = log Σ_{l≠k} exp s(k, l).

The similarity matrix is symmetric: row k's part in the losses of other anchors l is exp(s(k, l) − lse_l), which this rank
can compute once it knows lse_l. For NT-Xent over the M rows of both views

    ∂L/∂z_k = 1/(τM) · [ Σ_{l≠k} ( exp(s(k, l) − lse_k) + exp(s(k, l) − lse_l) ) z_l − 2 z_{pos k} ].

Three matrix products rather than the four of a loss that is differentiable in all columns (instance: four, too). Checked
against the reduce-scatter and the double loop in tests/contrast/test_parity.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from clae_dist import collectives
from clae_dist.contrast.chunked import chunk_size, log_sum_exp, log_sum_exp_and_mean, pull
from clae_dist.contrast.objectives import Rows, at_least_float32


def nt_xent(a: Rows, b: Rows, start: int, temperature: float, chunk: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """objectives.nt_xent; `all` of a and b are constants. With `group` None the rows are all there are."""
    return _NtXent.apply(a.mine, b.mine, a.all.detach(), b.all.detach(), start, temperature, chunk, group)


def instance(a: Rows, b: Rows, start: int, temperature: float, chunk: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """objectives.instance; `all` of a and b are constants."""
    return _Instance.apply(a.mine, b.mine, a.all.detach(), b.all.detach(), start, temperature, chunk, group)


LOG_SUM_EXP: dict[str, Callable[..., torch.Tensor]] = {"nt_xent": nt_xent, "instance": instance}


def all_rows(rows_BD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(B, …) on each rank to (N, …) on all, in the order of ranks, without gradient. A collective."""
    all_ND = rows_BD.new_empty((dist.get_world_size(group) * rows_BD.shape[0], *rows_BD.shape[1:]))
    collectives.all_gather(all_ND, rows_BD.contiguous(), group)
    return all_ND


def _everyones(lse_B: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    return lse_B if group is None else all_rows(lse_B, group)


class _NtXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        *rows, start, temperature, chunk, group = inputs
        a, b, all_a, all_b = (at_least_float32(row) for row in rows)
        chunk = chunk_size(len(a), a.device, chunk)
        lse_a = log_sum_exp(a, all_b, temperature, None, chunk, log_sum_exp(a, all_a, temperature, start, chunk))
        lse_b = log_sum_exp(b, all_a, temperature, None, chunk, log_sum_exp(b, all_b, temperature, start, chunk))
        positives = (a * b).sum(1) / temperature
        if any(ctx.needs_input_grad[:2]):  # the same on every rank
            all_lse = _everyones(torch.stack([lse_a, lse_b], 1), group)
            ctx.save_for_backward(*rows, all_lse)
            ctx.settings = start, temperature, chunk
        return ((lse_a - positives).mean() + (lse_b - positives).mean()) / 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        *rows, all_lse = ctx.saved_tensors
        a, b, all_a, all_b = (at_least_float32(row) for row in rows)
        start, temperature, chunk = ctx.settings
        views = ((a, all_a, all_lse[:, 0].contiguous()), (b, all_b, all_lse[:, 1].contiguous()))
        scale = grads[0] / (temperature * 2 * len(a))
        found: list[torch.Tensor | None] = []
        for number, (mine, _, lse) in enumerate(views):
            if not ctx.needs_input_grad[number]:
                found.append(None)
                continue
            out = views[1 - number][0] * -2.0
            own = lse[start : start + len(mine)]
            for other, (_, columns, lse_columns) in enumerate(views):
                itself = start if other == number else None
                pull(mine, columns, temperature, itself, chunk, out, lse_rows_K=own, lse_columns_M=lse_columns)
            found.append(out.mul_(scale).to(rows[number].dtype))
        return *found, None, None, None, None, None, None


class _Instance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        *rows, _, temperature, chunk, group = inputs
        a, b, _, all_b = (at_least_float32(row) for row in rows)
        chunk = chunk_size(len(a), a.device, chunk)
        mean = None
        if ctx.needs_input_grad[0]:  # its gradient comes along: one product less than similarities anew
            lse, mean = log_sum_exp_and_mean(a, all_b, temperature, chunk)
        else:
            lse = log_sum_exp(a, all_b, temperature, None, chunk)
        if any(ctx.needs_input_grad[:2]):
            ctx.save_for_backward(*rows, _everyones(lse, group), mean)
            ctx.settings = temperature, chunk
        return (lse - (a * b).sum(1) / temperature).mean()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        *rows, all_lse, mean = ctx.saved_tensors
        a, b, all_a, _ = (at_least_float32(row) for row in rows)
        temperature, chunk = ctx.settings
        scale = grads[0] / (temperature * len(a))
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = (mean - b).mul_(scale).to(rows[0].dtype)
        if ctx.needs_input_grad[1]:
            out = -a
            pull(b, all_a, temperature, None, chunk, out, lse_columns_M=all_lse)
            grad_b = out.mul_(scale).to(rows[1].dtype)
        return grad_a, grad_b, None, None, None, None, None, None
