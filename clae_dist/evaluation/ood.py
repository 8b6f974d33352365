"""Detection of images from another set: scores of a classifier and its features, and their quality.

# Q images of the evaluated set, O images of the other set, N images of the bank, F width of the features, C classes.
# Every score is larger for images that look more foreign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from clae_dist.evaluation.interval import Z_95
from clae_dist.evaluation.knn import nearest

_ROWS = 8192  # in float64 at once


def max_softmax_score(logits_QC: torch.Tensor) -> torch.Tensor:
    """Minus the largest probability. Reference: Hendrycks and Gimpel 2017."""
    return -logits_QC.double().softmax(1).amax(1)


def energy_score(logits_QC: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The free energy -T log Σ exp(logit / T). Reference: Liu et al. 2020."""
    return -temperature * (logits_QC.double() / temperature).logsumexp(1)


def knn_score(query_QF: torch.Tensor, bank_NF: torch.Tensor, k: int) -> torch.Tensor:
    """Euclidean distance of the normalised feature to its k-th neighbour in the bank. Reference: Sun et al. 2022."""
    rows_Q = nearest(query_QF, bank_NF, k).rows[:, -1]
    # From the difference itself: 2 - 2 cos would lose half of the digits near 0.
    return torch.cat(
        [
            (F.normalize(query_qF.double(), dim=1) - F.normalize(bank_NF[rows_q].double(), dim=1)).norm(dim=1)
            for query_qF, rows_q in zip(query_QF.split(_ROWS), rows_Q.split(_ROWS), strict=True)
        ]
    )


class Mahalanobis:
    """Gaussians with one covariance, fitted to the classes of a bank, and one Gaussian for all of it."""

    def __init__(self, bank_NF: torch.Tensor, labels_N: torch.Tensor) -> None:
        classes = 1 + int(labels_N.max())
        counts_C1 = torch.bincount(labels_N, minlength=classes)[:, None]
        sums_CF = torch.zeros((classes, bank_NF.shape[1]), dtype=torch.float64, device=bank_NF.device)
        total_FF = torch.zeros((bank_NF.shape[1],) * 2, dtype=torch.float64, device=bank_NF.device)
        self._centre_F = torch.stack([rows.double().sum(0) for rows in bank_NF.split(_ROWS)]).sum(0) / len(bank_NF)
        for rows_nF, labels_n in zip(bank_NF.split(_ROWS), labels_N.split(_ROWS), strict=True):
            centred_nF = rows_nF.double() - self._centre_F
            sums_CF.index_add_(0, labels_n, centred_nF)
            total_FF += centred_nF.T @ centred_nF
        present_C = counts_C1[:, 0] > 0
        means_CF = (sums_CF / counts_C1.clamp_min(1))[present_C]
        between_FF = (means_CF * counts_C1[present_C]).T @ means_CF
        self._total_FF = _inverse_root(total_FF / len(bank_NF))
        self._within_FF = _inverse_root((total_FF - between_FF) / len(bank_NF))
        self._means_CF = means_CF @ self._within_FF

    def score(self, query_QF: torch.Tensor) -> torch.Tensor:
        """Squared distance to the nearest class. Reference: Lee et al. 2018."""
        return torch.cat([self._to_classes(self._centred(rows)) for rows in query_QF.split(_ROWS)])

    def relative_score(self, query_QF: torch.Tensor) -> torch.Tensor:
        """`score` minus the squared distance to the whole bank's Gaussian. Reference: Ren et al. 2021."""
        return torch.cat(
            [
                self._to_classes(centred) - (centred @ self._total_FF).square().sum(1)
                for centred in map(self._centred, query_QF.split(_ROWS))
            ]
        )

    def _centred(self, rows_qF: torch.Tensor) -> torch.Tensor:
        return rows_qF.double() - self._centre_F

    def _to_classes(self, centred_qF: torch.Tensor) -> torch.Tensor:
        return (
            torch.cdist(centred_qF @ self._within_FF, self._means_CF, compute_mode="donot_use_mm_for_euclid_dist").amin(1) ** 2
        )


def _inverse_root(covariance_FF: torch.Tensor) -> torch.Tensor:
    """A matrix whose product with its transpose inverts the covariance; directions without variance are dropped."""
    variance_F, axes_FF = torch.linalg.eigh(covariance_FF)
    kept_F = variance_F > 1e-10 * variance_F[-1].clamp_min(1e-300)
    return axes_FF[:, kept_F] * variance_F[kept_F].rsqrt()


@dataclass(frozen=True)
class Detection:
    """Shares: area under the ROC curve with its 95 % interval, and the false positive rate at 95 % true positives."""

    auroc: float
    auroc_low: float
    auroc_high: float
    fpr95: float


def detect(score_Q: torch.Tensor, other_O: torch.Tensor) -> Detection:
    """Quality of a score as a detector of the other set.

    The false positive rate is the literature's, in which the evaluated set is the positive class: the threshold keeps 95 %
    of it, and the rate is the share of the other set that is kept too. (pytorch-ood's takes the other set as positive.)
    The interval covers the choice of images. Reference: DeLong et al. 1988.
    """
    score, other = (np.sort(part.detach().cpu().double().numpy()) for part in (score_Q, other_O))
    # The share of the other set above each image, ties as halves, and the reverse.
    above_Q = 1 - (np.searchsorted(other, score, "left") + np.searchsorted(other, score, "right")) / (2 * len(other))
    below_O = (np.searchsorted(score, other, "left") + np.searchsorted(score, other, "right")) / (2 * len(score))
    auroc = float(above_Q.mean())
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (above_Q, below_O) if len(part) > 1)
    half = Z_95 * math.sqrt(variance)
    threshold = score[math.ceil(0.95 * len(score)) - 1]
    fpr95 = float((other <= threshold).mean())
    return Detection(auroc, max(0.0, auroc - half), min(1.0, auroc + half), fpr95)
