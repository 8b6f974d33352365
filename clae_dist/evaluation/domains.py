"""The distance of two domains in the features of an encoder.

# n rows, F width of the features
"""

from __future__ import annotations

import torch

from clae_dist.evaluation.features import Features
from clae_dist.evaluation.linear import linear_probe

_ITERATIONS, _PENALTY = 100, 1e-2


def domain_distance(a_nF: torch.Tensor, b_nF: torch.Tensor, seed: int) -> float:
    """The proxy A-distance 2 (1 - 2 e) of two sets of features, where e is the error of a linear classifier of the set on a
    held-out half: 0 for sets that it cannot tell apart, 2 for sets that it always can. As many rows of each are used.

    Reference: Ben-David et al. 2007, Analysis of representations for domain adaptation.
    """
    count = min(len(a_nF), len(b_nF)) // 2 * 2
    assert count >= 4, "too few rows to hold half of them out"
    draw = torch.Generator().manual_seed(seed)
    chosen = [rows[torch.randperm(len(rows), generator=draw)[:count]] for rows in (a_nF, b_nF)]
    halves = []
    for part in (slice(0, count // 2), slice(count // 2, count)):
        rows = torch.cat([one[part] for one in chosen]).float()
        labels = torch.arange(2).repeat_interleave(count // 2)
        halves.append(Features(rows, labels, torch.arange(len(rows))))
    error = 1 - linear_probe(halves[0], halves[1], _ITERATIONS, _PENALTY).accuracy / 100
    return max(0.0, 2 * (1 - 2 * error))
