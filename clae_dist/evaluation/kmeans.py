"""K-means: Lloyd's algorithm from centres by k-means++; the same rows and seed give the same clusters.

Reference: Arthur & Vassilvitskii 2007, k-means++: the advantages of careful seeding.

# N rows, F width of a row, C centres.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_ROWS = 16_384  # whose distances to all centres are in memory at a time
_SETTLED = 1e-3  # share of the rows that may still change their cluster in the last iteration


def kmeans(
    rows_NF: torch.Tensor, count: int, seed: int, *, max_iterations: int = 100, progress: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """The cluster of each row of a tensor on the CPU, (N,), from 0 to count - 1; fewer if there are fewer different rows.

    `progress` is called for each centre that is drawn and in each iteration.
    """
    rows_NF = rows_NF - rows_NF.mean(0)  # distances as differences of squares lose fewer digits near 0
    centres_CF = _spread(rows_NF, count, torch.Generator().manual_seed(seed), progress)
    clusters_N = torch.full((len(rows_NF),), -1)
    for _ in range(max_iterations):
        progress()
        before_N, (clusters_N, centres_CF) = clusters_N, _moved(rows_NF, centres_CF)
        if int((clusters_N != before_N).sum()) <= _SETTLED * len(rows_NF):
            break
    return clusters_N


def _spread(rows_NF: torch.Tensor, count: int, generator: torch.Generator, progress: Callable[[], None]) -> torch.Tensor:
    """Rows drawn one after another, each in proportion to its squared distance from the nearest one drawn before."""
    squares_N = rows_NF.square().sum(1)
    chosen = [int(torch.randint(len(rows_NF), (), generator=generator))]
    nearest_N = torch.full_like(squares_N, torch.inf)
    while len(chosen) < count:
        progress()
        centre_F = rows_NF[chosen[-1]]
        distance_N = squares_N - 2 * (rows_NF @ centre_F) + squares_N[chosen[-1]]
        # A distance below rounding is that of an equal row, which must not become a centre again.
        distance_N = torch.where(distance_N > 1e-5 * (squares_N + squares_N[chosen[-1]]), distance_N, 0.0)
        nearest_N = torch.minimum(nearest_N, distance_N)
        upto_N = nearest_N.double().cumsum(0)
        if upto_N[-1] == 0:
            break
        drawn = torch.rand((), generator=generator, dtype=torch.float64) * upto_N[-1]
        chosen.append(min(int(torch.searchsorted(upto_N, drawn, right=True)), len(rows_NF) - 1))
    return rows_NF[chosen]


def _moved(rows_NF: torch.Tensor, centres_CF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centre of each row, and the means of the rows of each centre; one without rows stays."""
    half_C = centres_CF.square().sum(1) / 2
    sums_CF, sizes_C, clusters = torch.zeros_like(centres_CF), torch.zeros_like(half_C), []
    for part in rows_NF.split(_ROWS):
        clusters.append((part @ centres_CF.T - half_C).argmax(1))
        sums_CF.index_add_(0, clusters[-1], part)
        sizes_C += clusters[-1].bincount(minlength=len(centres_CF))
    return torch.cat(clusters), torch.where(sizes_C[:, None] > 0, sums_CF / sizes_C[:, None].clamp(min=1), centres_CF)
