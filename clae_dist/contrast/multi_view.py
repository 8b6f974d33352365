"""Losses on V views on the rows of all ranks, by the gradient contract of distributed.py.

# B rows on this rank, N rows on all ranks, D embedding width, V views, S scales.

As for an objective of the form PerAnchor, a rank that knows (log-sum-exp, adjoint) of all anchors computes the whole gradient
of its own rows: one number per anchor and scale is gathered in the forward, and nothing is sent in the backward. Pairs whose
columns are constants need not even that. The views of an image are on one rank, so that positives need no message either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from clae_dist import collectives
from clae_dist.config import Objective
from clae_dist.objectives.form import Rows
from clae_dist.objectives.multi_view import Pairs, ViewPairs
from clae_dist.objectives.softmax import Weights, at_least_float32, chunk_size, log_sum_exps, pull, stacked


def multi_view_loss(
    pairs: ViewPairs, views: Sequence[Rows], start: int, settings: Objective, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """This rank's share of the loss; `all` of the views are constants. Collective if pairs are live."""
    mine, everyone = [rows.mine for rows in views], [rows.all.detach() for rows in views]
    loss: torch.Tensor = _MultiViewLoss.apply(pairs, start, settings, group, *mine, *everyone)
    return loss


def dense_multi_view_loss(pairs: ViewPairs, views: Sequence[Rows], start: int, settings: Objective) -> torch.Tensor:
    """The same on the whole similarity matrix at once, by torch's autograd; differentiable in `all` of every view."""
    mine = [at_least_float32(rows.mine) for rows in views]
    everyone = [at_least_float32(rows.all) for rows in views]
    live = _dense(pairs, pairs.live, mine, everyone, start, settings)
    return live + _dense(pairs, pairs.constant, mine, [rows.detach() for rows in everyone], start, settings)


def _dense(
    loss: ViewPairs, pairs: Pairs, mine: list[torch.Tensor], everyone: list[torch.Tensor], start: int, settings: Objective
) -> torch.Tensor:
    num_rows, num_views = len(mine[0]), len(mine)
    own = torch.arange(num_rows, device=mine[0].device)
    lse = []
    for z in mine:
        s = z @ torch.cat(everyone).T / settings.temperature
        excluded = torch.zeros_like(s, dtype=torch.bool)
        for view in range(num_views):
            excluded[own, view * len(everyone[0]) + start + own] = True
        count = s.new_full((num_rows,), num_views * (len(everyone[0]) - 1)).log()
        lse.append(
            torch.stack([(c * s).masked_fill(excluded, -torch.inf).logsumexp(1) if c else count for c in loss.scales], 1)
        )
    positives = [rows[start : start + num_rows] for rows in everyone]
    pos = torch.stack([torch.stack([(z * other).sum(1) for other in positives]) for z in mine]) / settings.temperature
    return loss.losses(pairs, pos, torch.stack(lse), num_views * (len(everyone[0]) - 1), settings.temperature)


class _MultiViewLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: ViewPairs, start: int, settings: Objective, group: Any, *rows: torch.Tensor) -> torch.Tensor:
        count = len(rows) // 2
        mine, everyone = map(at_least_float32, rows[:count]), tuple(map(at_least_float32, rows[count:]))
        z_VBD = torch.stack(list(mine))
        temperature, num_negatives = settings.temperature, count * (len(everyone[0]) - 1)
        anchors = pairs.anchors
        anchors_AD = torch.cat([z_VBD[view] for view in anchors])
        chunk = chunk_size(anchors_AD, settings.chunk)
        lse_AS = log_sum_exps(anchors_AD, everyone, temperature, pairs.scales, start, chunk, len(anchors))
        lse_VBS = z_VBD.new_zeros((*z_VBD.shape[:2], len(pairs.scales)))
        for view, lse_BS in zip(anchors, lse_AS.chunk(len(anchors)), strict=True):
            lse_VBS[view] = lse_BS
        pos_VVB = torch.einsum("ubd,vbd->uvb", z_VBD, z_VBD) / temperature

        live = _adjoints(pairs, pairs.live, pos_VVB, lse_VBS, num_negatives, temperature)
        constant = _adjoints(pairs, pairs.constant, pos_VVB, lse_VBS, num_negatives, temperature)
        if any(ctx.needs_input_grad):
            own_VBS = _shifts(pairs, live[2] + constant[2], lse_VBS)
            column_NVS = None
            if pairs.live:
                shifts_BVS = _shifts(pairs, live[2], lse_VBS).transpose(0, 1).contiguous()
                column_NVS = shifts_BVS
                if group is not None:
                    column_NVS = shifts_BVS.new_empty((len(everyone[0]), *shifts_BVS.shape[1:]))
                    collectives.all_gather(column_NVS, shifts_BVS, group)
            # ∂ loss / ∂ z of view u at its other views: as anchor of every pair, and as column of live ones.
            ctx.save_for_backward(z_VBD, live[1] + live[1].transpose(0, 1) + constant[1], own_VBS, column_NVS, *everyone)
            ctx.settings = pairs, start, temperature, chunk, [row.dtype for row in rows[:count]]
        return live[0] + constant[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        z_VBD, positive_VVB, own_VBS, column_NVS, *everyone = ctx.saved_tensors
        pairs, start, temperature, chunk, dtypes = ctx.settings
        terms = [(index, scale, pairs.signs[index]) for index, scale in enumerate(pairs.scales) if scale]
        pulls_VBD = torch.einsum("uvb,vbd->ubd", positive_VVB, z_VBD)
        found: list[torch.Tensor | None] = []
        for view, (z, out) in enumerate(zip(z_VBD, pulls_VBD, strict=True)):
            if not ctx.needs_input_grad[4 + view]:
                found.append(None)
                continue
            own = [Weights(scale, sign, row_shift=own_VBS[view, :, index].contiguous()) for index, scale, sign in terms]
            for number, columns in enumerate(everyone):
                parts = own if view in pairs.anchors else []
                if column_NVS is not None and number in pairs.anchors:
                    shifts_SN = column_NVS[:, number].T.contiguous()
                    parts = parts + [Weights(c, sign, column_shift=shifts_SN[i, None]) for i, c, sign in terms]
                if parts:
                    pull(z, [columns], temperature, start, chunk, parts, out)
            found.append((out * (grads[0] / temperature)).to(dtypes[view]))
        return None, None, None, None, *found, *[None] * len(everyone)


def _adjoints(
    loss: ViewPairs, pairs: Pairs, pos_VVB: torch.Tensor, lse_VBS: torch.Tensor, num_negatives: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of these pairs, and its gradient in the similarities of views and in the log-sum-exps."""
    with torch.enable_grad():
        pos_VVB, lse_VBS = pos_VVB.detach().requires_grad_(), lse_VBS.detach().requires_grad_()
        value = loss.losses(pairs, pos_VVB, lse_VBS, num_negatives, temperature)
        if not pairs:
            return value.detach(), torch.zeros_like(pos_VVB), torch.zeros_like(lse_VBS)
        in_pos, in_lse = torch.autograd.grad(value, (pos_VVB, lse_VBS), allow_unused=True, materialize_grads=True)
    return value.detach(), in_pos, in_lse


def _shifts(loss: ViewPairs, grad_VBS: torch.Tensor, lse_VBS: torch.Tensor) -> torch.Tensor:
    """log|c ∂loss/∂lse| − lse at each scale c: -inf where there is no gradient."""
    factors = [scale * sign for scale, sign in zip(loss.scales, loss.signs, strict=True)]
    size = stacked([grad_VB * factor for grad_VB, factor in zip(grad_VBS.unbind(-1), factors, strict=True)])
    return torch.where(size == 0, -torch.inf, size.log() - lse_VBS)
