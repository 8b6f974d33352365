"""Objectives on the whole similarity matrix at once, by torch's autograd: for checking, and for objectives of another form.

# B rows on this rank, N rows on all ranks, M columns, A anchors, S scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from clae_dist.objectives.form import Dense, PerAnchor, PerPair, Rows
from clae_dist.objectives.softmax import at_least_float32


def dense_loss(objective: PerAnchor | PerPair | Dense, a: Rows, b: Rows, start: int, settings: Any) -> torch.Tensor:
    """The mean over this rank's anchors, differentiable in the rows of all ranks. Memory O(B · N)."""
    a, b = (Rows(at_least_float32(rows.mine), at_least_float32(rows.all)) for rows in (a, b))
    if isinstance(objective, Dense):
        return objective.function(a, b, start, settings)
    if isinstance(objective, PerPair):
        halves = [_pair_losses(objective, *views, (a.all, b.all), start, settings) for views in ((a, b), (b, a))]
        return torch.cat(halves).mean()
    if objective.columns == "other view":
        return _losses(objective, a, b, (b.all,), start, settings).mean()
    halves = [_losses(objective, *views, (a.all, b.all), start, settings) for views in ((a, b), (b, a))]
    return torch.cat(halves).mean()


def _losses(
    objective: PerAnchor, anchors: Rows, positives: Rows, blocks: tuple[torch.Tensor, ...], start: int, settings: Any
) -> torch.Tensor:
    s_BM, excluded = _similarities(anchors.mine, blocks, start, settings)
    num_negatives = s_BM.shape[1] - len(blocks)
    log_count = s_BM.new_full((len(s_BM),), num_negatives).log()  # at scale 0
    lse = [
        (scale * s_BM).masked_fill(excluded, -math.inf).logsumexp(1) if scale else log_count
        for scale in objective.scales(settings)
    ]
    pos_B = (anchors.mine * positives.all[start : start + len(s_BM)]).sum(1) / settings.temperature
    return objective.function(pos_B, torch.stack(lse, 1), num_negatives, settings)


def _pair_losses(
    objective: PerPair, anchors: Rows, positives: Rows, blocks: tuple[torch.Tensor, ...], start: int, settings: Any
) -> torch.Tensor:
    s_BM, excluded = _similarities(anchors.mine, [block.detach() for block in blocks], start, settings)
    positive_BD = positives.all[start : start + len(s_BM)].detach()
    pos_B = (anchors.mine * positive_BD).sum(1) / settings.temperature
    s_BM = s_BM.masked_fill(excluded, -math.inf)
    lse_B = torch.cat([pos_B[:, None], s_BM], 1).logsumexp(1)
    return lse_B - pos_B + objective.function(s_BM - lse_B[:, None], settings).sum(1)


def _similarities(
    anchors_BD: torch.Tensor, blocks: Sequence[torch.Tensor], start: int, settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities of anchors to the columns of all blocks, (B, M), and where a column is the anchor itself or its positive."""
    rows = torch.arange(len(anchors_BD), device=anchors_BD.device)
    s_BM = anchors_BD @ torch.cat(list(blocks)).T / settings.temperature
    excluded = torch.zeros_like(s_BM, dtype=torch.bool)
    for number, block in enumerate(blocks):
        excluded[rows, number * len(block) + start + rows] = True
    return s_BM, excluded
