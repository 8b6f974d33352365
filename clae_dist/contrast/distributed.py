"""Any objective on the rows of all ranks. This file holds the gradient contract.

# B rows on this rank, N rows on all ranks, D embedding width, V views of anchors, A = V·B anchors, S scales.

The contract:
1. Every rank holds the same number of rows.
2. Each rank's loss is the mean over its own anchors against all rows.
3. The gradient of a row is summed over ranks, because the anchors of every rank used it; the parallel backend averages over
   ranks. Then every parameter gradient is the single-process gradient of the global batch's mean loss.
4. The gradient with respect to an input arrives multiplied by the number of ranks, because no backend has averaged it.
5. The attack uses torch.autograd.grad with respect to the input alone (adversary.py).

An objective of the form PerPair satisfies point 3 as it is: the rows that an anchor is compared with are constants, so that
embeddings are gathered and nothing else is sent. For all others there are two ways:

log_sum_exp: for every objective of the form PerAnchor (objectives/form.py). The loss f of anchor k is a function of its
positive's similarity p_k and of log-sum-exps e_ks of its negatives at scales c_s. Autograd on these few numbers gives
g+ = ∂f/∂p and g_s = ∂f/∂e_s. The similarity matrix is symmetric, so a rank that knows (e_s, g_s) of all anchors computes the
whole gradient of its own rows without another message:

    ∂L/∂z_k = 1/(τA) [ (g+_k + g+_pos(k)) z_pos(k)
                       + Σ_s c_s Σ_l ( g_ks exp(c_s s_kl − e_ks) + g_ls exp(c_s s_kl − e_ls) ) z_l ],

l over the negatives of k. One number per anchor and scale is gathered, the shift log|c_s g_s| − e_s; the positive of a row is
on the same rank, so g+ is not. The sign of g_s is declared by the objective; a wrong declaration makes the gradient NaN.

reduce_scatter: for any function of the gathered rows (objectives/dense.py). The backward of the gather sums the gradients that
all ranks have for a row. Twice the bytes, and the similarity matrix exists at once.

A wrong gather does not change the forward loss; tests/contrast/test_parity.py compares gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from clae_dist import collectives
from clae_dist.config import Objective
from clae_dist.contrast.multi_view import dense_multi_view_loss, multi_view_loss
from clae_dist.errors import ConfigError
from clae_dist.objectives import Dense, PerAnchor, PerPair, find
from clae_dist.objectives.clusters import clustered_loss
from clae_dist.objectives.dense import dense_loss
from clae_dist.objectives.form import Rows
from clae_dist.objectives.groups import grouped_match, same_group, spread_positives
from clae_dist.objectives.multi_view import ViewPairs
from clae_dist.objectives.pairs import per_pair_loss
from clae_dist.objectives.softmax import (
    Weights,
    at_least_float32,
    chunk_size,
    log_sum_exp_and_mean,
    log_sum_exps,
    pull,
    stacked,
)


def all_rows(rows_BD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(B, …) on each rank to (N, …) on all, in the order of ranks, without gradient. Collective."""
    all_ND = rows_BD.new_empty((dist.get_world_size(group) * rows_BD.shape[0], *rows_BD.shape[1:]))
    collectives.all_gather(all_ND, rows_BD.contiguous(), group)
    return all_ND


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
        # Row k of rank r was used by every rank's anchors: its gradient is the sum of theirs.
        grad_BD = grad_ND.new_empty((grad_ND.shape[0] // dist.get_world_size(ctx.group), *grad_ND.shape[1:]))
        collectives.reduce_scatter(grad_BD, grad_ND.contiguous(), ctx.group)
        return grad_BD, None


def gather_rows(rows_BD: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(B, …) on each of W ranks to (W·B, …) on all of them, in the order of ranks; gradients are summed over ranks.

    Collective, in forward and in backward. Without a group it is the identity.
    """
    return rows_BD if group is None else _GatherRows.apply(rows_BD, group)


class Contrast:
    """The objective of a run on the rows of all ranks.

    Gather a view's rows once, with `rows`, and use them in every loss. With log_sum_exp, a loss must have the same weight on
    every rank, and the same rows must require gradient on every rank.
    """

    def __init__(self, settings: Objective, world: Any) -> None:
        self._objective, self._settings = find(settings.name), settings
        dense = isinstance(self._objective, Dense)
        if settings.gather == "log_sum_exp" and dense:
            raise ConfigError(
                f"objective.gather is 'log_sum_exp', but objective.name {settings.name!r} is a dense objective, which has no "
                "such form; use auto or reduce_scatter."
            )
        self.gather = ("reduce_scatter" if dense else "log_sum_exp") if settings.gather == "auto" else settings.gather
        self._rank, self._group = world.rank, world.group

    def of_this_rank_alone(self) -> Contrast:
        """The same objective without the negatives of other ranks."""
        alone = copy.copy(self)
        alone._rank, alone._group = 0, None
        return alone

    def rows(self, mine_BD: torch.Tensor) -> Rows:
        """This rank's rows together with those of all ranks. Collective."""
        if self._group is None:
            return Rows(mine_BD, mine_BD)
        if self.gather == "log_sum_exp":
            return Rows(mine_BD, all_rows(mine_BD.detach(), self._group))
        return Rows(mine_BD, gather_rows(mine_BD, self._group))

    def __call__(self, a: Rows, b: Rows) -> torch.Tensor:
        """This rank's share of the loss: the mean over its anchors, at least float32. Collective with log_sum_exp."""
        start = self._rank * len(a.mine)
        if self.gather == "reduce_scatter":
            return dense_loss(self._objective, a, b, start, self._settings)
        if isinstance(self._objective, PerPair):
            return per_pair_loss(self._objective, a, b, start, self._settings)
        assert isinstance(self._objective, PerAnchor)
        return per_anchor_loss(self._objective, a, b, start, self._settings, self._group)

    @property
    def temperature(self) -> float:
        return self._settings.temperature

    def everyones(self, values: torch.Tensor) -> torch.Tensor:
        """See Step.everyones."""
        return gather_rows(values, self._group)

    def spread_positives(self, a: Rows, b: Rows, groups_B: torch.Tensor) -> torch.Tensor:
        """See Step.spread_positives."""
        same_BN = same_group(groups_B, self.everyones(groups_B), self._rank * len(groups_B))
        return spread_positives(a, b, same_BN, self._settings.temperature)

    def clusters(
        self, a: Rows, b: Rows, centroids_CD: torch.Tensor, started: torch.Tensor, margin: tuple[float, float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Step.contrast_clusters."""
        start, views = self._rank * len(a.mine), (a.all.detach(), self.everyones(b.mine))
        return clustered_loss(a.mine, b.mine, views, centroids_CD, started, start, self._settings.temperature, margin)

    def of_views(self, pairs: ViewPairs, views: Sequence[Rows]) -> torch.Tensor:
        """See Step.contrast_views."""
        start = self._rank * len(views[0].mine)
        if self.gather == "reduce_scatter":
            return dense_multi_view_loss(pairs, views, start, self._settings)
        return multi_view_loss(pairs, views, start, self._settings, self._group)

    def match(
        self,
        queries_BD: torch.Tensor,
        keys: Rows,
        queue_KD: torch.Tensor | None,
        *,
        with_batch: bool,
        index: Any,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See Step.match. The similarities (B, K + N) exist at once."""
        z, mine, everyone = map(at_least_float32, (queries_BD, keys.mine.detach(), keys.all.detach()))
        images = torch.arange(len(mine), device=z.device)[index]
        blocks = [(z * mine[index]).sum(1, keepdim=True)]
        if queue_KD is not None:
            blocks.append(z @ queue_KD.to(z.dtype).T)
        if with_batch:
            own = (self._rank * len(mine) + images)[:, None] == torch.arange(len(everyone), device=z.device)
            blocks.append((z @ everyone.T).masked_fill(own, -torch.inf))
        similar = torch.cat(blocks, 1) / self._settings.temperature
        towards = similar[:, 0] if targets is None else (targets * similar[:, : targets.shape[1]]).sum(1)
        return (similar.logsumexp(1) - towards).mean()

    def shares(self, rows_BD: torch.Tensor, keys: Rows, queue_KD: torch.Tensor) -> torch.Tensor:
        """See Step.shares."""
        z, mine, queue = (at_least_float32(rows.detach()) for rows in (rows_BD, keys.mine, queue_KD))
        similar = torch.cat([(z * mine).sum(1, keepdim=True), z @ queue.to(z.dtype).T], 1)
        return (similar / self._settings.temperature).softmax(1)

    def match_groups(
        self, queries: Rows, keys: Rows, groups_N: torch.Tensor, queue: tuple[torch.Tensor, torch.Tensor], others: float
    ) -> torch.Tensor:
        """See Step.match_groups."""
        start, all_ND = self._rank * len(queries.mine), self.everyones(queries.mine)
        temperature = self._settings.temperature
        return grouped_match(queries.mine, all_ND, keys.all.detach(), groups_N, queue, start, others, temperature)


def per_anchor_loss(
    objective: PerAnchor, a: Rows, b: Rows, start: int, settings: Objective, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """The mean over this rank's anchors; `all` of a and b are constants. Collective. Without a group they are all rows."""
    loss: torch.Tensor = _PerAnchorLoss.apply(a.mine, b.mine, a.all.detach(), b.all.detach(), objective, start, settings, group)
    return loss


def _shifts_of_all_ranks(shift_BVS: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    return shift_BVS if group is None else all_rows(shift_BVS, group)


class _PerAnchorLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        rows, (objective, start, settings, group) = inputs[:4], inputs[4:]
        a, b, all_a, all_b = map(at_least_float32, rows)
        both = objective.columns == "both views"
        scales = tuple(objective.scales(settings))
        blocks, num_negatives = (all_a, all_b) if both else (all_b,), (len(all_a) - 1) * (1 + both)
        views = 1 + both
        anchors_AD = torch.cat([a, b]) if both else a
        chunk = chunk_size(anchors_AD, settings.chunk)
        mean_BD = None
        if not both and scales == (1.0,) and ctx.needs_input_grad[0]:
            # Half of the gradient in the same pass: one matrix product less than computing the similarities again.
            lse_B, mean_BD = log_sum_exp_and_mean(a, all_b, settings.temperature, start, chunk)
            lse_AS = lse_B[:, None]
        else:
            lse_AS = log_sum_exps(anchors_AD, blocks, settings.temperature, scales, start, chunk, views)
        pos_A = ((a * b).sum(1) / settings.temperature).repeat(views)
        if not any(ctx.needs_input_grad[:2]):
            mean: torch.Tensor = objective.function(pos_A, lse_AS, num_negatives, settings).mean()
            return mean
        loss, grad_pos_A, shift_AS = _adjoints(objective, scales, pos_A, lse_AS, num_negatives, settings)
        shift_BVS = shift_AS.view(views, len(a), len(scales)).transpose(0, 1).contiguous()
        # Rows of view a are columns of no anchor if the negatives are in the other view alone.
        if both or ctx.needs_input_grad[1]:
            all_shift_NVS = _shifts_of_all_ranks(shift_BVS, group)
        else:
            all_shift_NVS = shift_BVS
        own_BD = None if mean_BD is None else mean_BD * (objective.signs[0] * (shift_AS + lse_AS).exp()).detach()
        ctx.save_for_backward(*rows, grad_pos_A.view(views, -1).sum(0), shift_BVS, all_shift_NVS, own_BD)
        ctx.settings = objective, scales, start, settings.temperature, chunk
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        *rows, grad_pos_B, shift_BVS, all_shift_NVS, own_BD = ctx.saved_tensors
        objective, scales, start, temperature, chunk = ctx.settings
        a, b, all_a, all_b = map(at_least_float32, rows)
        both = objective.columns == "both views"
        terms = [(index, scale, objective.signs[index]) for index, scale in enumerate(scales) if scale]

        def own(views: list[int]) -> Iterator[Weights]:
            shifts_SA = shift_BVS[:, views[0] : views[-1] + 1].permute(2, 1, 0).flatten(1)
            return (Weights(scale, sign, row_shift=shifts_SA[index]) for index, scale, sign in terms)

        def of_columns() -> Iterator[Weights]:
            shifts_SVN = all_shift_NVS.permute(2, 1, 0).contiguous()
            return (Weights(scale, sign, column_shift=shifts_SVN[index]) for index, scale, sign in terms)

        def pulled(views: list[int], blocks: Sequence[torch.Tensor], parts: Sequence[Weights]) -> torch.Tensor:
            """The gradients of these views, one after the other."""
            out = torch.stack([(b, a)[view] for view in views]).mul_(grad_pos_B[:, None]).flatten(0, 1)
            if blocks:
                z = torch.cat([(a, b)[view] for view in views])
                pull(z, blocks, temperature, start, chunk, parts, out, len(views))
            return out

        wanted = [view for view in (0, 1) if ctx.needs_input_grad[view]]
        found: dict[int, torch.Tensor] = {}
        if both:
            both_views = pulled(wanted, (all_a, all_b), [*own(wanted), *of_columns()])
            found = dict(zip(wanted, both_views.chunk(len(wanted)), strict=True))
        else:
            if 0 in wanted:
                found[0] = pulled([0], (all_b,) if own_BD is None else (), [*own([0])])
                if own_BD is not None:
                    found[0] += own_BD
            if 1 in wanted:
                found[1] = pulled([1], (all_a,), [*of_columns()])
        scale = grads[0] / (temperature * shift_BVS.shape[1] * len(a))
        in_rows = [(found[view] * scale).to(rows[view].dtype) if view in found else None for view in (0, 1)]
        return *in_rows, None, None, None, None, None, None


def _adjoints(
    objective: PerAnchor,
    scales: tuple[float, ...],
    pos_A: torch.Tensor,
    lse_AS: torch.Tensor,
    num_negatives: int,
    settings: Objective,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean loss, each anchor's ∂f/∂p, and its shifts log|c ∂f/∂e| − e at each scale c: -inf where there is no gradient."""
    with torch.enable_grad():
        pos_A, lse_AS = pos_A.requires_grad_(), lse_AS.requires_grad_()
        losses_A = objective.function(pos_A, lse_AS, num_negatives, settings)
        grad_pos_A, grad_lse_AS = torch.autograd.grad(
            losses_A, (pos_A, lse_AS), torch.ones_like(losses_A), allow_unused=True, materialize_grads=True
        )
    factors = [scale * sign for scale, sign in zip(scales, objective.signs, strict=True)]
    size_AS = stacked([grad_A * factor for grad_A, factor in zip(grad_lse_AS.unbind(1), factors, strict=True)])
    shift_AS = torch.where(size_AS == 0, -torch.inf, size_AS.log() - lse_AS.detach())
    return losses_A.detach().mean(), grad_pos_A, shift_AS
