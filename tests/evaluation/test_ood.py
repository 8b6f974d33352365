from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from clae_dist.evaluation.ood import Mahalanobis, detect, energy_score, knn_score, max_softmax_score


def _normal(count: int, width: int = 6, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    return shift + torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _bank() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(300) % 3
    return _normal(300) + 4 * torch.eye(6, dtype=torch.float64)[labels], labels


def test_closed_forms_of_the_scores_of_logits() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0]])
    assert max_softmax_score(logits).tolist() == pytest.approx([-0.25, -1])
    assert energy_score(logits).tolist() == pytest.approx([-math.log(4), -1000])  # without overflow
    assert energy_score(logits, 2.0)[0].item() == pytest.approx(-2 * math.log(4))


def test_scores_are_those_of_pytorch_ood() -> None:
    detectors = pytest.importorskip("pytorch_ood.detector", reason="pip install pytorch-ood (extra test)")
    bank, labels = _bank()
    queries, logits = _normal(40, shift=1, seed=5), 3 * _normal(40, 4, seed=6)
    torch.testing.assert_close(energy_score(logits), detectors.EnergyBased.score(logits).double())
    torch.testing.assert_close(max_softmax_score(logits), detectors.MaxSoftmax.score(logits).double())
    theirs = detectors.KNN(None, k=7).fit_features(bank.float(), labels).predict_features(queries.float())
    torch.testing.assert_close(knn_score(queries, bank, 7), theirs.double(), rtol=1e-4, atol=1e-4)  # float32 there
    theirs = detectors.Mahalanobis(None).fit_features(bank.float(), labels).predict_features(queries.float())
    # The same up to a factor (n or n - C) and offset: the order of the images is what counts.
    assert torch.equal(Mahalanobis(bank, labels).score(queries).argsort(), theirs.double().argsort())


def test_a_point_of_the_bank_has_the_knn_score_0() -> None:
    """2 - 2 cos would give 3e-4, more than many a real difference."""
    bank = _normal(50).float()
    assert knn_score(bank, bank, 1).tolist() == [0.0] * 50
    queries = _normal(5, seed=1).float()
    direct = torch.cdist(torch.nn.functional.normalize(queries, dim=1), torch.nn.functional.normalize(bank, dim=1))
    torch.testing.assert_close(knn_score(queries, bank, 4), direct.sort(1).values[:, 3].double(), rtol=1e-4, atol=1e-5)


def test_mahalanobis_is_the_double_loop() -> None:
    bank, labels = _bank()
    queries = _normal(8, shift=1, seed=2)
    means = [bank[labels == label].mean(0) for label in range(3)]
    within = (
        sum((row - means[int(label)]).outer(row - means[int(label)]) for row, label in zip(bank, labels, strict=True)) / 300
    )
    total = torch.cov(bank.T, correction=0)
    direct = torch.stack([min((q - m) @ torch.linalg.inv(within) @ (q - m) for m in means) for q in queries])
    background = torch.stack([(q - bank.mean(0)) @ torch.linalg.inv(total) @ (q - bank.mean(0)) for q in queries])
    fitted = Mahalanobis(bank, labels)
    torch.testing.assert_close(fitted.score(queries), direct)
    torch.testing.assert_close(fitted.relative_score(queries), direct - background)


def test_mahalanobis_ignores_constant_features_and_linear_maps() -> None:
    bank, labels = _bank()
    queries = _normal(8, seed=2)
    expected = Mahalanobis(bank, labels).score(queries)
    matrix = torch.eye(6, dtype=torch.float64) + 0.3 * _normal(6, seed=9)
    torch.testing.assert_close(Mahalanobis(bank @ matrix, labels).score(queries @ matrix), expected, rtol=1e-6, atol=1e-6)
    widened = [torch.cat([rows, torch.full((len(rows), 1), 7.0)], 1) for rows in (bank, queries)]
    torch.testing.assert_close(Mahalanobis(widened[0], labels).score(widened[1]), expected)


def test_auroc_is_scikit_learns_with_ties() -> None:
    inside, outside = _normal(300, 1)[:, 0], _normal(200, 1, 0.7, 1)[:, 0]
    for one, other in ((inside, outside), ((2 * inside).round(), (2 * outside).round())):
        labels = torch.cat([torch.zeros(300), torch.ones(200)])
        expected = roc_auc_score(labels.numpy(), torch.cat([one, other]).numpy())
        assert detect(one, other).auroc == pytest.approx(expected)


def test_limits_of_auroc() -> None:
    scores = _normal(2000, 1)[:, 0]
    same = detect(scores, _normal(2000, 1, seed=7)[:, 0])
    assert abs(same.auroc - 0.5) < 3 * 0.0092  # the deviation of two samples of 2,000
    assert same.auroc_low < same.auroc < same.auroc_high
    assert same.auroc_high - same.auroc_low == pytest.approx(2 * 1.96 * 0.0092, rel=0.1)
    assert abs(same.fpr95 - 0.95) < 0.02
    disjoint = detect(scores, scores + 100)
    assert (disjoint.auroc, disjoint.fpr95, disjoint.auroc_low, disjoint.auroc_high) == (1, 0, 1, 1)
    assert detect(scores, scores - 100).auroc == 0


def test_a_monotone_transform_changes_nothing() -> None:
    inside, outside = _normal(100, 1)[:, 0], _normal(80, 1, 1, 1)[:, 0]
    assert detect(inside, outside) == detect(inside.exp(), outside.exp())


def test_the_false_positive_rate_is_the_literatures() -> None:
    """95 % of the evaluated set is kept: with 20 images, all but the one that looks most foreign."""
    inside = torch.arange(20).double()
    outside = torch.tensor([5.0, 18.0, 18.5, 30.0])
    assert detect(inside, outside).fpr95 == 0.5  # 5 and 18 are at most the 19th score, 18


def test_the_false_positive_rate_is_not_pytorch_oods() -> None:
    metrics = pytest.importorskip("pytorch_ood.metrics", reason="pip install pytorch-ood (extra test)")
    inside, outside = _normal(4000, 1)[:, 0], 2 * _normal(4000, 1, 1, 1)[:, 0]
    theirs = metrics.OODMetrics()
    # Theirs takes the other set as positive, so that exchanging the sets and the sign gives ours.
    labels = torch.cat([-torch.ones(4000), torch.ones(4000)]).long()
    theirs.update(-torch.cat([inside, outside]), labels)
    assert detect(inside, outside).fpr95 == pytest.approx(float(theirs.compute()["FPR95TPR"]), abs=0.003)
