from __future__ import annotations

import pytest
import torch
from torchmetrics.retrieval import RetrievalMAP

from clae_dist.evaluation import retrieval
from clae_dist.evaluation.retrieval import retrieve


def _normal(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_is_torchmetrics_mean_average_precision() -> None:
    features, labels = _normal(60, 5), torch.arange(60) % 4
    unit = torch.nn.functional.normalize(features, dim=1)
    score, target, index = [], [], []
    for query in range(60):
        others = [row for row in range(60) if row != query]
        score.append(2 + unit[others] @ unit[query])  # torchmetrics takes no image with a negative score as relevant
        target.append(labels[others] == labels[query])
        index.append(torch.full((59,), query))
    expected = RetrievalMAP()(torch.cat(score), torch.cat(target), indexes=torch.cat(index))
    result = retrieve(features, labels, torch.arange(60), (1, 5))
    assert result.mean_average_precision == pytest.approx(float(expected), abs=1e-6)


def test_recall_is_the_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_QUERIES", 7)
    features, labels = _normal(40, 3), torch.arange(40) % 5
    unit = torch.nn.functional.normalize(features, dim=1)
    queries = torch.tensor([3, 17, 4, 39, 0, 8, 9, 21, 22])
    for k in (1, 4, 100):
        hits = 0
        for query in queries.tolist():
            others = sorted((row for row in range(40) if row != query), key=lambda row: -float(unit[row] @ unit[query]))
            hits += any(labels[row] == labels[query] for row in others[:k])
        assert retrieve(features, labels, queries, (k,)).recall_at[k] == pytest.approx(hits / len(queries))


def test_limits() -> None:
    labels = torch.arange(50) % 5
    perfect = retrieve(torch.eye(5)[labels], labels, torch.arange(50), (1,))
    assert (perfect.mean_average_precision, perfect.recall_at[1], perfect.queries) == (1, 1, 50)
    noise = retrieve(_normal(2000, 64), torch.arange(2000) % 5, torch.arange(2000), (1,))
    assert noise.mean_average_precision == pytest.approx(0.2, abs=0.01)  # the share of a class
    assert noise.recall_at[1] == pytest.approx(0.2, abs=0.03)


def test_a_query_alone_in_its_class_is_not_counted() -> None:
    result = retrieve(_normal(5, 3), torch.tensor([0, 0, 1, 2, 2]), torch.arange(5), (1,))
    assert result.queries == 4


def test_an_image_does_not_find_itself() -> None:
    """With itself first, every recall would be 1."""
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    result = retrieve(features, torch.tensor([0, 1, 0, 1]), torch.arange(4), (1,))
    assert result.recall_at[1] == 0
    assert result.mean_average_precision == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
