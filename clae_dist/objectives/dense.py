"""Objectives on the whole similarity matrix at once, by torch's autograd: for checking, and for objectives of another form.

# B rows on this rank, N rows on all ranks, M columns, A anchors, S scales.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from clae_dist.objectives.form import Dense, PerAnchor, Rows
from clae_dist.objectives.softmax import at_least_float32


def dense_loss(objective: PerAnchor | Dense, a: Rows, b: Rows, start: int, settings: Any) -> torch.Tensor:
    """The mean over this rank's anchors, differentiable in the rows of all ranks. Memory O(B · N)."""
    a, b = (Rows(at_least_float32(rows.mine), at_least_float32(rows.all)) for rows in (a, b))
    if isinstance(objective, Dense):
        return objective.function(a, b, start, settings)
    if objective.columns == "other view":
        return _losses(objective, a, b, (b.all,), start, settings).mean()
    halves = [_losses(objective, *views, (a.all, b.all), start, settings) for views in ((a, b), (b, a))]
    return torch.cat(halves).mean()


def _losses(
    objective: PerAnchor, anchors: Rows, positives: Rows, blocks: tuple[torch.Tensor, ...], start: int, settings: Any
) -> torch.Tensor:
    rows = torch.arange(len(anchors.mine), device=anchors.mine.device)
    columns = torch.cat(blocks)
    s_BM = anchors.mine @ columns.T / settings.temperature
    excluded = torch.zeros_like(s_BM, dtype=torch.bool)
    for number, block in enumerate(blocks):
        excluded[rows, number * len(block) + start + rows] = True
    num_negatives = len(columns) - len(blocks)
    log_count = s_BM.new_full((len(s_BM),), num_negatives).log()  # at scale 0
    lse = [
        (scale * s_BM).masked_fill(excluded, -math.inf).logsumexp(1) if scale else log_count
        for scale in objective.scales(settings)
    ]
    pos_B = (anchors.mine * positives.all[start : start + len(rows)]).sum(1) / settings.temperature
    return objective.function(pos_B, torch.stack(lse, 1), num_negatives, settings)
