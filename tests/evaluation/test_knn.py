from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from clae_dist.errors import DataError
from clae_dist.evaluation.features import Features
from clae_dist.evaluation.knn import classify, knn_accuracy, nearest


def _reference(bank: torch.Tensor, labels: list[int], query: torch.Tensor, k: int, temperature: float) -> int:
    """Wu et al. 2018, section 3.4, as it is written: one query, double precision, loops."""
    cosines = []
    for row in bank.double():
        dot = sum(float(a) * float(b) for a, b in zip(query.double(), row, strict=True))
        cosines.append(dot / math.sqrt(float(query.double().square().sum()) * float(row.square().sum())))
    order = sorted(range(len(cosines)), key=lambda i: (-cosines[i], i))[:k]
    votes = dict.fromkeys(range(max(labels) + 1), 0.0)
    for i in order:
        votes[labels[i]] += math.exp(cosines[i] / temperature)
    return max(votes, key=lambda c: (votes[c], -c))


@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_is_the_double_loop(features_of: Callable[..., Features], k: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(k)
    labels = torch.randint(0, 5, (60,), generator=generator)
    bank = features_of(torch.randn(60, 6, generator=generator) + labels[:, None] * 0.3, labels)
    queries = features_of(torch.randn(25, 6, generator=generator), torch.randint(0, 5, (25,), generator=generator))
    expected = [_reference(bank.features_NF, labels.tolist(), query, k, temperature) for query in queries.features_NF]
    assert classify(bank, queries.features_NF, k, temperature).tolist() == expected
    right = sum(a == b for a, b in zip(expected, queries.labels_N.tolist(), strict=True))
    assert knn_accuracy(bank, queries, k, temperature) == pytest.approx(100 * right / 25)


def test_chunks_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    queries, bank = torch.randn(11, 8, generator=generator), torch.randn(101, 8, generator=generator)
    whole = nearest(queries, bank, 9)
    for query_chunk, bank_chunk in ((4, 10), (11, 7), (1, 1000)):
        parts = nearest(queries, bank, 9, query_chunk, bank_chunk)
        assert torch.equal(parts.rows, whole.rows)
        # float32: a matrix product's order of summation depends on its shape
        torch.testing.assert_close(parts.cosines, whole.cosines, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bank_chunk", [4, 7, 1000])
def test_among_equal_cosines_the_lower_rows_win(bank_chunk: int) -> None:
    """topk alone takes any of equals: neighbours would differ between machines and chunk sizes."""
    bank = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(20, 1)  # odd rows equal the query
    near = nearest(torch.tensor([[2.0, 0.0]]), bank, 6, bank_chunk=bank_chunk)
    assert near.rows.tolist() == [[1, 3, 5, 7, 9, 11]]
    past_the_equals = nearest(torch.tensor([[2.0, 0.0]]), bank, 23, bank_chunk=bank_chunk)
    assert past_the_equals.rows.tolist() == [[*range(1, 40, 2), 0, 2, 4]]


def test_k_beyond_the_bank_is_the_whole_bank(features_of: Callable[..., Features]) -> None:
    bank = features_of(torch.eye(3), [0, 1, 2])
    assert nearest(torch.eye(3), bank.features_NF, 200).rows.shape == (3, 3)
    assert knn_accuracy(bank, bank, 200, 0.1) == 100


def test_small_temperatures_do_not_overflow(features_of: Callable[..., Features]) -> None:
    """exp(1 / 0.001) is infinite, and infinite votes of two classes are equal."""
    bank = features_of(torch.tensor([[1.0, 0.02], [1.0, 0.0]]), [0, 1])
    assert classify(bank, torch.tensor([[1.0, 0.0]]), 2, 0.001).tolist() == [1]


def test_votes_are_counted_in_chunks(features_of: Callable[..., Features], monkeypatch: pytest.MonkeyPatch) -> None:
    """Votes of all queries for all classes at once are 10 GB where both are many."""
    generator = torch.Generator().manual_seed(0)
    bank = features_of(torch.randn(40, 4, generator=generator), torch.arange(40) % 7)
    queries = torch.randn(23, 4, generator=generator)
    whole = classify(bank, queries, 5, 0.1)
    monkeypatch.setattr("clae_dist.evaluation.knn._QUERIES", 4)
    assert torch.equal(classify(bank, queries, 5, 0.1), whole)


def test_images_without_labels_are_refused(features_of: Callable[..., Features]) -> None:
    labelled, unlabelled = features_of(torch.eye(3), [0, 1, 2]), features_of(torch.eye(3), [0, -1, -1])
    with pytest.raises(DataError, match=r"train split has 2 images without a class of 3; .* class folders"):
        knn_accuracy(unlabelled, labelled, 1, 0.1)
    with pytest.raises(DataError, match="test split has 2 images"):
        knn_accuracy(labelled, unlabelled, 1, 0.1)
