"""Detection of images from another set: scores of a classifier and its features, and their quality.

# Q images of the evaluated set, O images of the other set, N images of the bank, F width of the features, C classes.
# Every score is larger for images that look more foreign.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from clae_dist.config.rules import Section, setting
from clae_dist.data.draws import uniforms
from clae_dist.evaluation.interval import Z_95
from clae_dist.evaluation.knn import nearest, usable_k
from clae_dist.evaluation.passes import Change, changed_features
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject

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


# ---- the protocol ----


@dataclass(frozen=True)
class OodSettings(Section, prefix="ood"):
    """Settings of the protocol `ood`."""

    sets: tuple[str, ...] = setting(
        ("noise", "blurred"),
        help="Folders of shards with foreign images, resized to the evaluated side, or the controls noise (independent pixels) "
        "and blurred (the test images at half resolution: a resolution cue alone). The first gives the headline.",
    )
    images: int = setting(10_000, ge=2, help="Images of each set, of more a choice by the seed.")
    knn_k: int = setting(50, ge=1, help="Neighbour of the kNN score. Published: 50 for CIFAR-10, 200 CIFAR-100, 1000 ImageNet.")


class Ood(EvaluationProtocol):
    """Detection of images of other sets, among the test images, by scores of the linear probe and of the features."""

    name, title = "ood", "detection of foreign images"
    uses_head = collective = True
    Settings = OodSettings

    def run(self, subject: Subject) -> dict[str, float]:
        _, place = subject.parts()
        features: dict[str, torch.Tensor] = {}
        for location in self.own.sets:
            name, rows = self._features(subject, location)
            features[name if name not in features else f"{name}_{len(features) + 1}"] = rows
        metrics: dict[str, float] = place.world.run_on_main(lambda: self._metrics(subject, features))
        return metrics

    def _features(self, subject: Subject, location: str) -> tuple[str, torch.Tensor]:
        """The name of a foreign set or a control, and its features. Collective."""
        (model, place), limit = subject.parts(), self.own.images
        if location in CONTROLS:
            images = place.images(place.config.data.test_split, limit)
            key = {"control": location}
            return location, changed_features(subject, images, key, CONTROLS[location], f"features, {location}").features_NF
        further = place.further(location)
        split = place.config.data.test_split
        split = split if split in further.manifest.splits else next(iter(further.manifest.splits))
        name = re.sub(r"\W+", "_", further.manifest.name).strip("_") or "set"
        images = further.images(split, limit)
        return name, further.features({"after": model}, images, f"features, {name}")["after"].features_NF

    def _metrics(self, subject: Subject, features: Mapping[str, torch.Tensor]) -> dict[str, float]:
        inside = subject.queries.choice(self.own.images, subject.seed).features_NF
        scores = self._scores(subject)
        own = {name: score(inside) for name, score in scores.items()}
        metrics: dict[str, float] = {}
        for foreign, outside in features.items():
            for name, score in scores.items():
                other = score(outside)
                found, key = detect(own[name], other), f"{foreign}_{name}"
                metrics[f"{key}_auroc"] = 100 * found.auroc
                if name == "knn":
                    metrics[f"{key}_auroc_low"], metrics[f"{key}_auroc_high"] = 100 * found.auroc_low, 100 * found.auroc_high
                metrics[f"{key}_fpr95"] = 100 * found.fpr95
                _histogram(subject, key, own[name], other)
        return metrics

    def _scores(self, subject: Subject) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """The scores of features (Q, F), the headline's first."""
        head, bank, device = subject.head, subject.bank, subject.device
        assert head is not None
        bank_NF, labels_N = bank.features_NF.to(device), bank.labels_N.to(device)
        gaussians, k = Mahalanobis(bank_NF, labels_N), usable_k(self.own.knn_k, len(bank))
        return {
            "knn": lambda rows: knn_score(rows.to(device), bank_NF, k),
            "msp": lambda rows: max_softmax_score(head.logits(rows)),
            "energy": lambda rows: energy_score(head.logits(rows)),
            "mahalanobis": lambda rows: gaussians.score(rows.to(device)),
            "relative_mahalanobis": lambda rows: gaussians.relative_score(rows.to(device)),
        }

    def settings(self, subject: Subject) -> dict[str, Any]:
        return {**super().settings(subject), "knn_k": usable_k(self.own.knn_k, len(subject.bank))}

    def describe(self, settings: Mapping[str, Any]) -> str:
        return (
            f"area under the ROC curve of the distance to the {settings['knn_k']}th neighbour in the train images, test images "
            f"against the first of {len(settings['sets'])} sets of foreign images; 50 is chance"
        )


def _noise(images_n3SS: torch.Tensor, ids_n: np.ndarray) -> torch.Tensor:
    """Images of independent uniform pixels."""
    values = uniforms(math.prod(images_n3SS.shape[1:]), 0x6E6F, ids_n)
    return torch.from_numpy((256 * values).astype(np.uint8)).reshape(images_n3SS.shape)


def _blurred(images_n3SS: torch.Tensor, ids_n: np.ndarray) -> torch.Tensor:
    """Images at half their resolution."""
    side = images_n3SS.shape[2]
    half = F.interpolate(images_n3SS, (max(1, side // 2),) * 2, mode="bilinear", antialias=True)
    return F.interpolate(half, (side, side), mode="bilinear")


CONTROLS: dict[str, Change] = {"noise": _noise, "blurred": _blurred}


def _histogram(subject: Subject, key: str, inside_Q: torch.Tensor, outside_O: torch.Tensor) -> None:
    """Shares of both sets in 40 bins between the outer percentiles, for the report."""
    both = np.concatenate([part.detach().cpu().double().numpy() for part in (inside_Q, outside_O)])
    first, last = np.quantile(both, (0.005, 0.995)).tolist()
    if first == last:
        return
    edges = np.linspace(first, last, 41)
    subject.details[f"{key}_edges"] = edges.tolist()
    for name, scores in (("inside", inside_Q), ("outside", outside_O)):
        counts = np.histogram(scores.detach().cpu().double().numpy().clip(first, last), edges)[0]
        subject.details[f"{key}_{name}"] = (counts / len(scores)).tolist()
