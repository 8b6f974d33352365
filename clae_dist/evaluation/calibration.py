"""Calibration of classifiers: agreement of predicted probabilities with observed frequencies.

# n images, C classes, M bins, R resamples
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from clae_dist.evaluation.linear import HELD_OUT, fit_head
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject

NUM_BINS = 15  # Guo et al. 2017
_RESAMPLES = 1000
_LOG_TEMPERATURES = (math.log(1e-3), math.log(1e3))


@dataclass(frozen=True)
class Reliability:
    """The bins of a reliability diagram: images, mean confidence and accuracy (shares) of each; 0 for an empty bin."""

    counts_M: np.ndarray  # noqa: N815 - dimensions
    confidence_M: np.ndarray  # noqa: N815
    accuracy_M: np.ndarray  # noqa: N815

    @property
    def error(self) -> float:
        """Mean over images of the distance between accuracy and confidence of their bin, a share."""
        weights = self.counts_M / max(1, self.counts_M.sum())
        return float((weights * np.abs(self.accuracy_M - self.confidence_M)).sum())


def reliability(confidence_n: torch.Tensor, correct_n: torch.Tensor, num_bins: int = NUM_BINS) -> Reliability:
    """Bins of equal width, closed on the right, so that a confidence of exactly 1 belongs to the last."""
    confidence, correct = _float64(confidence_n), _float64(correct_n)
    return _reliability(_equal_width(confidence, num_bins), confidence, correct, num_bins)


def adaptive_reliability(confidence_n: torch.Tensor, correct_n: torch.Tensor, num_bins: int = NUM_BINS) -> Reliability:
    """Bins of equal numbers of images, in the order of confidence. Reference: Nguyen and O'Connor 2015."""
    confidence, correct = _float64(confidence_n), _float64(correct_n)
    bin_n = np.empty(len(confidence), np.int64)
    bin_n[np.argsort(confidence, kind="stable")] = np.arange(len(confidence)) * num_bins // max(1, len(confidence))
    return _reliability(bin_n, confidence, correct, num_bins)


def classwise_error(probability_nC: torch.Tensor, labels_n: torch.Tensor, num_bins: int = NUM_BINS) -> float:
    """Mean over classes of the calibration error of "the image is of this class". Reference: Kull et al. 2019."""
    errors = [
        reliability(probability_n, labels_n == label, num_bins).error for label, probability_n in enumerate(probability_nC.T)
    ]
    return sum(errors) / len(errors)


def negative_log_likelihood(logits_nC: torch.Tensor, labels_n: torch.Tensor) -> float:
    """Mean cross entropy in nats."""
    return float(F.cross_entropy(logits_nC.double(), labels_n))


def brier_score(probability_nC: torch.Tensor, labels_n: torch.Tensor) -> float:
    """Mean squared distance to the one-hot label, summed over classes (0 to 2). Reference: Brier 1950."""
    probability_nC = probability_nC.double()
    picked_n = probability_nC.gather(1, labels_n[:, None])[:, 0]
    return float((probability_nC.square().sum(1) - 2 * picked_n + 1).mean())


def fit_temperature(logits_nC: torch.Tensor, labels_n: torch.Tensor) -> float:
    """The temperature T that minimises the cross entropy of logits / T. Reference: Guo et al. 2017.

    The loss is convex in 1/T, so its derivative changes sign once; the root is found by bisection of log T. A derivative
    without a change of sign (every image right, or none above chance) gives the end of the range, 0.001 or 1000.
    """
    logits_nC = logits_nC.double()
    right_n = logits_nC.gather(1, labels_n[:, None])[:, 0]
    low, high = _LOG_TEMPERATURES
    for _ in range(50):
        middle = (low + high) / 2
        expected_n = ((logits_nC * math.exp(-middle)).softmax(1) * logits_nC).sum(1)
        if float((expected_n - right_n).mean()) > 0:  # d loss / d (1/T): the probabilities are too sharp
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def error_interval(confidence_n: torch.Tensor, correct_n: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval, as shares, of the equal-width calibration error.

    The error is biased upwards on few images, and that of a resample is so once more; the basic ("reverse percentile")
    interval takes that out, and is therefore often below the plain estimate. Reference: Davison and Hinkley 1997, chapter 5.
    """
    confidence, correct = _float64(confidence_n), _float64(correct_n)
    bin_n, count = _equal_width(confidence, NUM_BINS), len(confidence)
    generator = np.random.Generator(np.random.PCG64(seed))
    error_R = np.empty(_RESAMPLES)
    for resample in range(_RESAMPLES):
        weight_n = np.bincount(generator.integers(0, count, count), minlength=count)
        gap_M = np.bincount(bin_n, weight_n * (correct - confidence), NUM_BINS)
        error_R[resample] = np.abs(gap_M).sum() / count
    error = _reliability(bin_n, confidence, correct, NUM_BINS).error
    low, high = np.quantile(error_R, (0.025, 0.975))
    return max(0.0, float(2 * error - high)), max(0.0, float(2 * error - low))


def _float64(values_n: torch.Tensor) -> np.ndarray:
    return values_n.detach().cpu().double().numpy()


def _equal_width(confidence: np.ndarray, num_bins: int) -> np.ndarray:
    return np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)


def _reliability(bin_n: np.ndarray, confidence: np.ndarray, correct: np.ndarray, num_bins: int) -> Reliability:
    counts_M = np.bincount(bin_n, minlength=num_bins)
    sums = [np.bincount(bin_n, values, num_bins) / np.maximum(counts_M, 1) for values in (confidence, correct)]
    return Reliability(counts_M, *sums)


class Calibration(EvaluationProtocol):
    """Calibration of the linear probe on the test split, before and after temperature scaling."""

    name, title = "calibration", "calibration error"
    uses_head = True

    def run(self, subject: Subject) -> dict[str, float]:
        """The temperature is fitted on a tenth of train that the classifier has not seen; so is none of it on test."""
        assert subject.head is not None
        bank, device = subject.bank, subject.device
        order_N = torch.randperm(len(bank), generator=torch.Generator().manual_seed(subject.seed))
        num_held = min(max(1, round(HELD_OUT * len(bank))), len(bank) - 1)
        held, kept = order_N[:num_held].sort().values, order_N[num_held:].sort().values
        iterations = subject.settings.linear_iterations
        head = fit_head(bank.rows(kept), subject.num_classes, iterations, subject.head.penalty, subject.seed, device)
        held_nC, logits_nC = (head.logits(part) for part in (bank.features_NF[held], subject.queries.features_NF))
        temperature = fit_temperature(held_nC, bank.labels_N[held])
        labels_n = subject.queries.labels_N
        plain, scaled = (_measures(logits, labels_n) for logits in (logits_nC, logits_nC / temperature))
        confidence_n, predicted_n = logits_nC.double().softmax(1).max(1)
        low, high = error_interval(confidence_n, predicted_n == labels_n, subject.seed)
        for name, logits in (("", logits_nC), ("scaled_", logits_nC / temperature)):
            bins = _top_bins(logits, labels_n)
            subject.details[f"{name}images"] = bins.counts_M.tolist()
            subject.details[f"{name}confidence"] = bins.confidence_M.tolist()
            subject.details[f"{name}accuracy"] = bins.accuracy_M.tolist()
        metrics = {"ece": plain.pop("ece"), "ece_low": 100 * low, "ece_high": 100 * high, **plain}
        return {**metrics, "temperature": temperature, **{f"scaled_{name}": value for name, value in scaled.items()}}

    def describe(self, settings: Mapping[str, Any]) -> str:
        return (
            f"expected calibration error ({NUM_BINS} bins of equal width) of logistic regression on nine tenths of the train "
            "images, lower is better; the temperature is fitted on the other tenth"
        )


def _top_bins(logits_nC: torch.Tensor, labels_n: torch.Tensor) -> Reliability:
    confidence_n, predicted_n = logits_nC.double().softmax(1).max(1)
    return reliability(confidence_n, predicted_n == labels_n)


def _measures(logits_nC: torch.Tensor, labels_n: torch.Tensor) -> dict[str, float]:
    """Errors in percent, likelihood in nats, Brier score from 0 to 2."""
    probability_nC = logits_nC.double().softmax(1)
    confidence_n, predicted_n = probability_nC.max(1)
    correct_n = predicted_n == labels_n
    return {
        "ece": 100 * reliability(confidence_n, correct_n).error,
        "adaptive_ece": 100 * adaptive_reliability(confidence_n, correct_n).error,
        "classwise_ece": 100 * classwise_error(probability_nC, labels_n),
        "nll": negative_log_likelihood(logits_nC, labels_n),
        "brier": brier_score(probability_nC, labels_n),
    }
