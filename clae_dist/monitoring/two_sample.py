"""Tests whether two samples of features have one distribution: MMD, a classifier, principal components, neighbours.

# R rows of the reference, M rows of the window, N rows of both, F width of the features, P permutations, K components
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy import stats

from clae_dist.errors import ConfigError
from clae_dist.evaluation.knn import nearest
from clae_dist.evaluation.logistic import principal_axes, solve

COMPONENTS = 32
_ROWS = 8192  # of distances at once
_PENALTY, _ITERATIONS, _TOLERANCE = 1e-2, 30, 1e-4  # of the classifier
_NEIGHBOURS = 10
_BEYOND = 0.99  # quantile of the reference's distances


@dataclass(frozen=True)
class Finding:
    """The p-value of a test and its effect size, in the test's own unit."""

    p: float
    effect: float


# ---- maximum mean discrepancy ----


def kernel(rows_NF: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """exp(-d² / 2σ²) between all rows, float64 (N, N), with zeros on the diagonal, which an unbiased estimate omits."""
    gram_NN = torch.exp(-torch.cdist(rows_NF, rows_NF).square() / (2 * bandwidth**2))
    return gram_NN.fill_diagonal_(0)


def median_distance(rows_RF: torch.Tensor) -> float:
    """The median distance between two rows. Raises ConfigError if most rows are equal."""
    median = float(torch.pdist(rows_RF.double()).median())
    if median <= 0:
        raise ConfigError("most embeddings of the reference are equal; embed different images.")
    return median


def mmd2(gram_NN: torch.Tensor, members_NP: torch.Tensor) -> torch.Tensor:
    """Unbiased estimates of MMD² (P,) between the rows that each column of `members` (of 0 and 1) marks and the others.

    Reference: Gretton et al. 2012, A Kernel Two-Sample Test, equation 3.
    """
    size_P, total = members_NP.sum(0), len(gram_NN)
    within_P = (members_NP * (gram_NN @ members_NP)).sum(0)
    touching_P = gram_NN.sum(1) @ members_NP
    between_P = touching_P - within_P
    others_P = gram_NN.sum() - 2 * touching_P + within_P
    rest_P = total - size_P
    return within_P / (size_P * (size_P - 1)) + others_P / (rest_P * (rest_P - 1)) - 2 * between_P / (size_P * rest_P)


def draw_members(total: int, size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """(total, count) of 0 and 1, float64: `size` ones in each column, at random."""
    order = torch.rand((total, count), generator=generator, dtype=torch.float64).argsort(0)
    return (order < size).double()


def mmd_test(
    reference_RF: torch.Tensor, window_MF: torch.Tensor, bandwidth: float, permutations: int, generator: torch.Generator
) -> Finding:
    """By permutations of the rows; the effect is MMD²."""
    gram_NN = kernel(torch.cat([window_MF, reference_RF]).double(), bandwidth)
    size, total = len(window_MF), len(gram_NN)
    found = float(mmd2(gram_NN, (torch.arange(total) < size).double()[:, None]))
    permuted_P = mmd2(gram_NN, draw_members(total, size, permutations, generator))
    return Finding((1 + int((permuted_P >= found).sum())) / (1 + permutations), found)


def witness(rows_MF: torch.Tensor, part_M: torch.Tensor, reference_RF: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """How much more a window's rows are like each other than like the reference, (M,): the rows that make MMD² large.

    Args:
        part_M: the rows of the window that stand for all of it, indices.

    Reference: Gretton et al. 2012, section 2.3.
    """
    is_own_M = torch.zeros(len(rows_MF), dtype=torch.float64).index_fill_(0, part_M, 1.0)
    part_PF, reference_RF = rows_MF[part_M].double(), reference_RF.double()
    found = []
    for rows_mF, own_m in zip(rows_MF.double().split(_ROWS), is_own_M.split(_ROWS), strict=True):
        like_part_m, like_reference_m = (
            torch.exp(-torch.cdist(rows_mF, others).square() / (2 * bandwidth**2)) for others in (part_PF, reference_RF)
        )
        found.append((like_part_m.sum(1) - own_m) / (len(part_PF) - own_m) - like_reference_m.mean(1))
    return torch.cat(found)


# ---- classifier ----


def classifier_test(reference_RF: torch.Tensor, window_MF: torch.Tensor, generator: torch.Generator) -> Finding:
    """Logistic regression on equally many rows of both: a binomial test of its accuracy on a held-out half, whose AUROC is the
    effect.

    One split and no cross-validation: classifiers of several folds share rows, and the binomial test would find a difference
    twice as often as it promises (31 of 300 windows at 5 %).
    Reference: Lopez-Paz and Oquab 2017, Revisiting Classifier Two-Sample Tests.
    """
    size = min(len(reference_RF), len(window_MF))
    rows = [part[torch.randperm(len(part), generator=generator)[:size]] for part in (reference_RF, window_MF)]
    x_NF, y_N = torch.cat(rows).double(), torch.arange(2).repeat_interleave(size)
    held_N = torch.arange(size).repeat(2) % 2 == 1
    score_n, y_n = _margins(x_NF[~held_N], y_N[~held_N], x_NF[held_N]), y_N[held_N]
    right, half = int(((score_n > 0).long() == y_n).sum()), len(y_n) // 2
    area = stats.mannwhitneyu(score_n[y_n == 1].numpy(), score_n[y_n == 0].numpy()).statistic / half**2
    return Finding(float(stats.binomtest(right, 2 * half, 0.5, alternative="greater").pvalue), float(area))


def _margins(train_NF: torch.Tensor, labels_N: torch.Tensor, held_nF: torch.Tensor) -> torch.Tensor:
    """How much more a held-out row resembles class 1."""
    mean_F, scale_F = train_NF.mean(0), train_NF.std(0).clamp_min(1e-12)
    train_NF, held_nF = (train_NF - mean_F) / scale_F, (held_nF - mean_F) / scale_F
    start = train_NF.new_zeros((train_NF.shape[1], 2)), train_NF.new_zeros(2)
    solution = solve(train_NF, labels_N, principal_axes(train_NF), start, _PENALTY, _ITERATIONS, _TOLERANCE)
    logits_n2 = held_nF.double() @ solution.weight.double() + solution.bias.double()
    return logits_n2[:, 1] - logits_n2[:, 0]


def look_test(reference_R: torch.Tensor, window_M: torch.Tensor) -> Finding:
    """Kolmogorov-Smirnov of one number an image; the effect is the distance of the distribution functions."""
    found = stats.ks_2samp(reference_R.numpy(), window_M.numpy())
    return Finding(float(found.pvalue), float(found.statistic))


# ---- components and neighbours, whose directions and bank are of other rows than those compared ----


def components_test(fitted_RF: torch.Tensor, reference_RF: torch.Tensor, window_MF: torch.Tensor) -> Finding:
    """Kolmogorov-Smirnov along the first components of `fitted`, with Bonferroni's correction; the effect is the largest
    distance of two distribution functions."""
    centre_F = fitted_RF.mean(0)
    axes_FK = principal_axes((fitted_RF - centre_F).float()).axes_FK[:, -COMPONENTS:].float()
    ours, theirs = ((rows - centre_F).float() @ axes_FK for rows in (reference_RF, window_MF))
    found = [stats.ks_2samp(a.numpy(), b.numpy()) for a, b in zip(ours.T, theirs.T, strict=True)]
    return Finding(min(1.0, len(found) * min(float(one.pvalue) for one in found)), max(float(one.statistic) for one in found))


def distances(bank_RF: torch.Tensor, rows_MF: torch.Tensor) -> torch.Tensor:
    """The Euclidean distance (M,) of each normalised row to its tenth neighbour in the bank."""
    k = min(_NEIGHBOURS, len(bank_RF))
    neighbours_MF = F.normalize(bank_RF[nearest(rows_MF, bank_RF, k).rows[:, -1]].double(), dim=1)
    return (F.normalize(rows_MF.double(), dim=1) - neighbours_MF).norm(dim=1)


def distance_test(reference_R: torch.Tensor, window_M: torch.Tensor) -> Finding:
    """Mann-Whitney's test that the distances are as large; the effect is the share beyond the reference's 99 % quantile."""
    p = stats.mannwhitneyu(window_M.numpy(), reference_R.numpy(), alternative="two-sided").pvalue
    return Finding(float(p), float((window_M > reference_R.quantile(_BEYOND)).double().mean()))
