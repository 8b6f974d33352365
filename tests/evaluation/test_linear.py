from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from clae_dist.errors import DataError
from clae_dist.evaluation import linear
from clae_dist.evaluation.features import Features
from clae_dist.evaluation.linear import linear_probe


@pytest.fixture
def gaussian(features_of: Callable[..., Features]) -> Callable[..., Features]:
    def make(count: int, gap: float, seed: int, width: int = 12) -> Features:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 4
        centres = torch.randn(4, width, generator=torch.Generator().manual_seed(99))
        scales = torch.logspace(-2, 2, width)  # features of very different size
        return features_of((gap * centres[labels] + torch.randn(count, width, generator=generator)) * scales, labels)

    return make


def test_separable_classes_are_all_right(gaussian: Callable[..., Features]) -> None:
    probe = linear_probe(gaussian(400, 6, 0), gaussian(200, 6, 1))
    assert probe.accuracy == 100
    assert probe.held_out_accuracy == 100


def test_random_labels_are_chance(features_of: Callable[..., Features]) -> None:
    """An accuracy above chance here would mean that the test split's labels had leaked into the fit."""
    generator = torch.Generator().manual_seed(0)
    train, test = (
        features_of(torch.randn(n, 30, generator=generator), torch.randint(0, 4, (n,), generator=generator))
        for n in (800, 2000)
    )
    probe = linear_probe(train, test)
    assert abs(probe.accuracy - 25) < 5  # five standard deviations of 2000 guesses


def test_the_test_split_has_no_part_in_the_choice(gaussian: Callable[..., Features]) -> None:
    train, test = gaussian(300, 0.8, 0), gaussian(100, 0.8, 1)
    shifted = Features(test.features_NF * 5 + 3, (test.labels_N + 1) % 4, test.ids_N)
    one, other = linear_probe(train, test), linear_probe(train, shifted)
    assert (one.penalty, one.held_out_accuracy) == (other.penalty, other.held_out_accuracy)


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_is_logistic_regression(gaussian: Callable[..., Features], penalty: float) -> None:
    """scikit-learn solves the same convex problem: C = 1 / (penalty · N) on standardised features."""
    train, test = gaussian(500, 0.7, 2), gaussian(1000, 0.7, 3)
    x = train.features_NF.double().numpy()
    mean, std = x.mean(0), x.std(0)
    reference = LogisticRegression(C=1 / (penalty * len(train)), tol=1e-8, max_iter=1000)
    reference.fit((x - mean) / std, train.labels_N.numpy())
    expected = reference.predict((test.features_NF.double().numpy() - mean) / std)
    accuracy = 100 * float(np.mean(expected == test.labels_N.numpy()))
    # Both stop near the optimum; a few images lie on its boundary.
    assert linear_probe(train, test, penalty=penalty).accuracy == pytest.approx(accuracy, abs=0.3)


def test_same_arguments_same_result(gaussian: Callable[..., Features]) -> None:
    train, test = gaussian(300, 0.5, 4), gaussian(300, 0.5, 5)
    assert linear_probe(train, test, seed=3) == linear_probe(train, test, seed=3)


def test_the_penalty_is_refitted_on_all_of_train(gaussian: Callable[..., Features], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    fit = linear._fit

    def counted(x: torch.Tensor, *rest: object) -> object:
        sizes.append(len(x))
        return fit(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(linear, "_fit", counted)
    linear_probe(gaussian(200, 1, 0), gaussian(50, 1, 1))
    assert sizes == [180] * len(linear.PENALTIES) + [200]


def test_constant_features_and_unseen_classes_do_no_harm(features_of: Callable[..., Features]) -> None:
    train = features_of(torch.tensor([[0.0, 7.0], [1.0, 7.0], [0.0, 7.0], [1.0, 7.0]]), [0, 1, 0, 1])
    test = features_of(torch.tensor([[0.0, 9.0], [1.0, 9.0], [1.0, 9.0]]), [0, 1, 5])
    assert linear_probe(train, test).accuracy == pytest.approx(200 / 3)


def test_images_without_labels_are_refused(features_of: Callable[..., Features]) -> None:
    with pytest.raises(DataError, match="without a class"):
        linear_probe(features_of(torch.eye(2), [-1, -1]), features_of(torch.eye(2), [0, 1]))
