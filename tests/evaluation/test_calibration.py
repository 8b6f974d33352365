from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from clae_dist.evaluation.calibration import (
    adaptive_reliability,
    brier_score,
    classwise_error,
    error_interval,
    fit_temperature,
    negative_log_likelihood,
    reliability,
)


def _logits(count: int, classes: int = 5, sharpness: float = 2.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sharpness * torch.randn(count, classes, generator=generator, dtype=torch.float64)


def _drawn(probability: torch.Tensor, seed: int = 1) -> torch.Tensor:
    return torch.multinomial(probability, 1, generator=torch.Generator().manual_seed(seed))[:, 0]


def _top(probability: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    confidence, predicted = probability.max(1)
    return confidence, predicted == labels


def test_is_torchmetrics_on_bins_of_equal_width() -> None:
    probability = _logits(700).softmax(1)
    labels = torch.randint(0, 5, (700,), generator=torch.Generator().manual_seed(3))
    expected = MulticlassCalibrationError(5, n_bins=15, norm="l1")(probability, labels)
    assert reliability(*_top(probability, labels)).error == pytest.approx(float(expected), abs=1e-6)  # float32 there


def test_the_error_of_labels_drawn_from_the_probabilities_falls_as_the_root_of_n() -> None:
    errors = []
    for count in (1_000, 100_000):
        probability = _logits(count).softmax(1)
        errors.append(reliability(*_top(probability, _drawn(probability))).error)
    assert errors[0] < 0.06
    assert errors[1] < errors[0] / 5  # √100 = 10, and luck


@pytest.mark.parametrize("bins", [reliability, adaptive_reliability])
def test_a_confidence_of_1_with_an_accuracy_of_p_has_the_error_1_minus_p(bins: object) -> None:
    """Bins that are open on the right would lose the images of confidence 1."""
    correct = torch.arange(100) < 70
    assert bins(torch.ones(100), correct).error == pytest.approx(0.3)  # type: ignore[operator]


def test_bins_are_closed_on_the_right() -> None:
    assert reliability(torch.tensor([0.5, 0.500001]), torch.tensor([True, True]), 2).counts_M.tolist() == [1, 1]


def test_adaptive_bins_have_equal_numbers() -> None:
    confidence = torch.linspace(0.9, 0.91, 30)
    counts = adaptive_reliability(confidence, confidence > 0.905, 15).counts_M
    assert counts.tolist() == [2] * 15
    assert reliability(confidence, confidence > 0.905, 15).error == pytest.approx(abs(0.905 - 0.5), abs=1e-6)


def test_classwise_error_is_the_double_loop() -> None:
    probability, labels = _logits(90, 3).softmax(1), _drawn(_logits(90, 3, 0.1).softmax(1))
    total = 0.0
    for label in range(3):
        for low in range(15):
            rows = [i for i in range(90) if low / 15 < float(probability[i, label]) <= (low + 1) / 15]
            if rows:
                confidence = sum(float(probability[i, label]) for i in rows)
                total += abs(sum(int(labels[i]) == label for i in rows) - confidence) / 90 / 3
    assert classwise_error(probability, labels) == pytest.approx(total)


def test_closed_forms_of_likelihood_and_brier_score() -> None:
    uniform, labels = torch.zeros(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    assert negative_log_likelihood(uniform, labels) == pytest.approx(math.log(4))
    assert brier_score(uniform.softmax(1), labels) == pytest.approx(0.75**2 + 3 * 0.25**2)
    assert brier_score(torch.eye(4)[labels], labels) == 0
    assert brier_score(torch.eye(4)[(labels + 1) % 4], labels) == 2


@pytest.mark.parametrize("factor", [0.05, 0.5, 1.0, 3.0, 40.0])
def test_temperature_scaling_undoes_a_factor(factor: float) -> None:
    logits = _logits(4000)
    labels = _drawn(logits.softmax(1))
    once = fit_temperature(logits, labels)
    assert once == pytest.approx(1, abs=0.06)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor * once, rel=1e-6)


def test_temperature_lowers_the_likelihood_where_it_was_fitted_and_keeps_the_classes() -> None:
    for seed in range(5):
        logits = _logits(60, 4, 3, seed)
        labels = _drawn((0.3 * logits).softmax(1), seed)
        temperature = fit_temperature(logits, labels)
        scaled = logits / temperature
        assert negative_log_likelihood(scaled, labels) <= negative_log_likelihood(logits, labels) + 1e-9
        assert torch.equal(scaled.argmax(1), logits.argmax(1))
        for other in (0.9, 1.1):
            assert negative_log_likelihood(scaled / other, labels) >= negative_log_likelihood(scaled, labels) - 1e-9


def test_the_temperature_of_perfect_logits_is_the_end_of_the_range() -> None:
    assert fit_temperature(torch.eye(3), torch.arange(3)) == pytest.approx(1e-3)


def test_the_interval_holds_the_error_that_a_shift_makes() -> None:
    """Confidences 0.1 too high: the true error is 0.1; the interval of 95 % holds it in most of 60 draws."""
    inside, widths = 0, []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        confidence = 0.5 + 0.4 * torch.rand(400, generator=generator, dtype=torch.float64)
        correct = torch.rand(400, generator=generator) < confidence - 0.1
        low, high = error_interval(confidence, correct, seed)
        inside += low <= 0.1 <= high
        widths.append(high - low)
    assert inside >= 50
    assert 0.03 < sum(widths) / 60 < 0.15


def test_the_interval_is_a_function_of_the_seed() -> None:
    confidence = torch.rand(100, generator=torch.Generator().manual_seed(0))
    correct = confidence > 0.5
    assert error_interval(confidence, correct, 3) == error_interval(confidence, correct, 3)
    assert error_interval(confidence, correct, 3) != error_interval(confidence, correct, 4)
