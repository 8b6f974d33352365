"""Cluster Learnability and intrinsic dimension of representations, without labels.

# n rows, D width, K clusters
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from clae_dist.config.rules import Section, setting
from clae_dist.evaluation.knn import nearest
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject

_ROWS = 2048
_LLOYD_STEPS = 100


@dataclass(frozen=True)
class Learnability:
    """Mean accuracy and standard deviation, as shares."""

    mean: float
    deviation: float


def k_means(rows_nD: torch.Tensor, k: int, seed: int = 0) -> torch.Tensor:
    """Cluster numbers (n,): Lloyd's algorithm from k-means++ centres drawn from `seed`; float64, so that it repeats.

    A cluster that loses all its rows takes over the row that is farthest from its centre. Reference: Arthur and
    Vassilvitskii 2007.
    """
    rows_nD = rows_nD.double()
    generator = torch.Generator().manual_seed(seed)
    centres_KD = _spread_centres(rows_nD, k, generator)
    cluster_n, previous_n = _assign(rows_nD, centres_KD), None
    for _ in range(_LLOYD_STEPS):
        if previous_n is not None and torch.equal(cluster_n[0], previous_n):
            break
        previous_n, distance_n = cluster_n
        count_K = torch.bincount(previous_n, minlength=k)
        centres_KD = torch.zeros_like(centres_KD).index_add_(0, previous_n, rows_nD) / count_K.clamp_min(1)[:, None]
        empty = (count_K == 0).nonzero()[:, 0]
        centres_KD[empty] = rows_nD[distance_n.topk(len(empty)).indices]
        cluster_n = _assign(rows_nD, centres_KD)
    return cluster_n[0]


def _spread_centres(rows_nD: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """k rows: each next one with probability proportional to its squared distance to the nearest chosen one."""
    first = int(torch.randint(len(rows_nD), (), generator=generator))
    chosen = [first]
    distance_n = (rows_nD - rows_nD[first]).square().sum(1)
    while len(chosen) < k:
        cumulative_n = distance_n.cumsum(0)
        draw = float(torch.rand((), generator=generator, dtype=torch.float64)) * float(cumulative_n[-1])
        row = min(int(torch.searchsorted(cumulative_n, draw, right=True)), len(rows_nD) - 1)
        chosen.append(row)
        distance_n = torch.minimum(distance_n, (rows_nD - rows_nD[row]).square().sum(1))
    return rows_nD[chosen].clone()


def _assign(rows_nD: torch.Tensor, centres_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centre of each row, the first of equals, and the squared distance to it."""
    offset_K = centres_KD.square().sum(1)
    nearest_n, distance_n = [], []
    for rows_bD in rows_nD.split(_ROWS):
        least = (offset_K - 2 * rows_bD @ centres_KD.T).min(1)
        nearest_n.append(least.indices)
        distance_n.append(least.values + rows_bD.square().sum(1))
    return torch.cat(nearest_n), torch.cat(distance_n)


def cluster_learnability(rows_nD: torch.Tensor, clusters: int = 0, splits: int = 5, seed: int = 0) -> Learnability:
    """Cluster Learnability (CL): validation accuracy of a nearest neighbour on K-means labels.

    The form of the journal version: mean over `splits` random halves. Rows are normalised, the neighbour is by cosine.
    Reference: Lu et al. 2023, "Using representation expressiveness and learnability to evaluate self-supervised methods".

    Args:
        clusters: K; 0 for the root of the number of rows.
    """
    rows_nD, labels_n = _clustered(rows_nD, clusters, seed)
    accuracies = []
    for split in range(splits):
        order = torch.randperm(len(rows_nD), generator=torch.Generator().manual_seed(seed + 1 + split)).to(rows_nD.device)
        train, validation = order[: len(order) // 2], order[len(order) // 2 :]
        row = nearest(rows_nD[validation], rows_nD[train], 1).rows[:, 0]
        accuracies.append(float((labels_n[train][row] == labels_n[validation]).double().mean()))
    return _mean_and_deviation(accuracies)


def prequential_learnability(rows_nD: torch.Tensor, clusters: int = 0, orders: int = 5, seed: int = 0) -> Learnability:
    """CL as first published: accuracy of a nearest neighbour among the rows seen before, averaged along a random order.

    The first row, which has no neighbour, is not counted. Reference: Lu et al. 2022, arXiv 2206.01251 version 1.
    """
    rows_nD, labels_n = _clustered(rows_nD, clusters, seed)
    count = len(rows_nD)
    places = [
        torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1 + order)).to(rows_nD.device)
        for order in range(orders)
    ]
    right = [0] * orders
    for rows_b in torch.arange(count, device=rows_nD.device).split(_ROWS):
        cosine_bn = rows_nD[rows_b] @ rows_nD.T
        for order, place_n in enumerate(places):
            before_bn = place_n[None, :] < place_n[rows_b][:, None]
            neighbour_b = cosine_bn.masked_fill(~before_bn, -torch.inf).argmax(1)
            right[order] += int(((labels_n[neighbour_b] == labels_n[rows_b]) & before_bn.any(1)).sum())
    return _mean_and_deviation([number / (count - 1) for number in right])


def _clustered(rows_nD: torch.Tensor, clusters: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows_nD = F.normalize(rows_nD, dim=1)
    return rows_nD, k_means(rows_nD, clusters or max(2, math.isqrt(len(rows_nD))), seed)


def _mean_and_deviation(values: list[float]) -> Learnability:
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return Learnability(mean, math.sqrt(spread))


@dataclass(frozen=True)
class Dimension:
    """TwoNN estimates: maximum likelihood, and the slope over the lowest 90 % of the distance ratios; `rows` were used."""

    likelihood: float
    slope: float
    rows: int


def intrinsic_dimension(rows_nD: torch.Tensor) -> Dimension:
    """Dimension of the manifold near the rows from the distances to two neighbours. Reference: Facco et al. 2017.

    Equal rows count once: their distance 0 would make the ratio infinite. Large dimensions are under-estimated.
    """
    rows_nD = torch.unique(rows_nD.double(), dim=0)
    count = len(rows_nD)
    if count < 3:
        return Dimension(math.nan, math.nan, count)
    ratios = []
    rows_nD = rows_nD - rows_nD.mean(0)
    square_n = rows_nD.square().sum(1)
    for rows_b in torch.arange(count, device=rows_nD.device).split(_ROWS):
        square_bn = square_n - 2 * rows_nD[rows_b] @ rows_nD.T  # less the row's own, which is the same for all
        square_bn.scatter_(1, rows_b[:, None], torch.inf)
        two_b2 = square_bn.topk(2, largest=False).indices
        distance_b2 = (rows_nD[two_b2] - rows_nD[rows_b][:, None]).norm(dim=2)  # again, with all digits
        ratios.append((distance_b2.amax(1) / distance_b2.amin(1)).log())
    log_ratio_n = torch.cat(ratios).sort().values
    likelihood = (count - 1) / float(log_ratio_n.sum())
    kept = max(1, int(0.9 * count))
    x = log_ratio_n[:kept]
    y = -torch.log1p(-torch.arange(1, kept + 1, dtype=torch.float64, device=x.device) / count)
    return Dimension(likelihood, float((x * y).sum() / x.square().sum()), count)


@dataclass(frozen=True)
class LearnabilitySettings(Section, prefix="learnability"):
    """Settings of the protocol `learnability`."""

    images: int = setting(10_000, ge=10, help="Test images, of more a choice by the seed.")
    clusters: int = setting(0, ge=0, zero="the root of the number of images", help="K-means clusters.")
    splits: int = setting(5, ge=1, help="Random halves, and random orders of the prequential form.")


class LearnabilityProtocol(EvaluationProtocol):
    """Cluster Learnability in both published forms, and the intrinsic dimension, of the test images."""

    name, title = "learnability", "cluster learnability"
    uses_labels = False
    Settings = LearnabilitySettings

    def run(self, subject: Subject) -> dict[str, float]:
        rows_nD = subject.queries.choice(self.own.images, subject.seed).features_NF.to(subject.device)
        arguments = (self.own.clusters, self.own.splits, subject.seed)
        halves, prequential = cluster_learnability(rows_nD, *arguments), prequential_learnability(rows_nD, *arguments)
        dimension = intrinsic_dimension(rows_nD)
        metrics = {
            "learnability": 100 * halves.mean,
            "learnability_deviation": 100 * halves.deviation,
            "prequential": 100 * prequential.mean,
            "prequential_deviation": 100 * prequential.deviation,
            "intrinsic_dimension": dimension.likelihood,
            "intrinsic_dimension_slope": dimension.slope,
            "distinct_rows": float(dimension.rows),
        }
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def describe(self, settings: Mapping[str, Any]) -> str:
        clusters = f"K = {settings['clusters']}" if settings["clusters"] else "K = √n"
        return (
            f"accuracy of a nearest neighbour on K-means labels ({clusters}) of up to {settings['images']:,} test images, mean "
            f"over {settings['splits']} random halves"
        )
