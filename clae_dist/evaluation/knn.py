"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4).

# Q queries, N images of the bank, F width of the features, K neighbours
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from clae_dist.errors import DataError
from clae_dist.evaluation.features import Features
from clae_dist.evaluation.interval import accuracy_metrics
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject

_QUERIES = 1000  # whose votes are in memory at once


@dataclass(frozen=True)
class Neighbours:
    """The K nearest of the bank for every query, nearest first: cosines (Q, K) and rows of the bank (Q, K)."""

    cosines: torch.Tensor
    rows: torch.Tensor


def nearest(
    query_QF: torch.Tensor, bank_NF: torch.Tensor, k: int, query_chunk: int = 1000, bank_chunk: int = 25_000
) -> Neighbours:
    """The `k` rows of the bank with the highest cosine to each query; at most N of them.

    Among equal cosines the lower row wins. Memory is bounded by query_chunk x (bank_chunk + k) similarities.
    """
    k = min(k, bank_NF.shape[0])
    bank_NF = F.normalize(bank_NF, dim=1)
    cosines: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    for query_qF in F.normalize(query_QF, dim=1).split(query_chunk):
        best_qK = query_qF.new_zeros((query_qF.shape[0], 0))
        row_qK = torch.zeros((query_qF.shape[0], 0), dtype=torch.int64, device=query_QF.device)
        for first in range(0, bank_NF.shape[0], bank_chunk):
            cosine_qn = query_qF @ bank_NF[first : first + bank_chunk].T
            column_qk = _first_of_the_largest(cosine_qn, k)
            # The best so far come first: they all are lower rows, and win among equals.
            best_qK = torch.cat([best_qK, cosine_qn.gather(1, column_qk)], dim=1)
            row_qK = torch.cat([row_qK, first + column_qk], dim=1)
            column_qk = _first_of_the_largest(best_qK, k)
            best_qK, row_qK = best_qK.gather(1, column_qk), row_qK.gather(1, column_qk)
        cosines.append(best_qK)
        rows.append(row_qK)
    return Neighbours(torch.cat(cosines), torch.cat(rows))


def _first_of_the_largest(value_qn: torch.Tensor, k: int) -> torch.Tensor:
    """Columns (q, k) of the k largest values of each row, in falling order, the first column first among equals.

    torch.topk leaves open which of equal values it takes, so the rows where that matters are sorted in full.
    """
    n = value_qn.shape[1]
    top = value_qn.topk(min(k + 1, n), dim=1)
    column_qk = top.indices[:, :k].sort(dim=1).values
    order = value_qn.gather(1, column_qk).sort(dim=1, descending=True, stable=True).indices
    column_qk = column_qk.gather(1, order)
    if n > k:
        torn_q = top.values[:, k - 1] == top.values[:, k]  # a tie across the k-th place
        if torn_q.any():
            column_qk[torn_q] = value_qn[torn_q].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return column_qk


def usable_k(k: int, bank_images: int) -> int:
    """`k`, at most a third of the bank: with more, the votes come close to the bank's class counts, whatever the query is."""
    return max(1, min(k, bank_images // 3))


def require_labels(split: str, features: Features) -> None:
    """Raises DataError unless every image of the split has a class."""
    missing = int((features.labels_N < 0).sum())
    if missing or not len(features):
        raise DataError(
            f"the {split} split has {missing} images without a class of {len(features)}; an accuracy needs labels for all of "
            "them: prepare the set from a folder of class folders (python -m data_prep prepare)."
        )


def classify(bank: Features, query_QF: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    """The class (Q,) with the largest sum of votes exp(cosine / temperature) among the k nearest; the lower class on ties."""
    near = nearest(query_QF, bank.features_NF.to(query_QF.device), k)
    # Relative to the nearest neighbour, which cannot overflow and leaves the order of the sums as it is.
    vote_QK = ((near.cosines - near.cosines[:, :1]).double() / temperature).exp()
    labels_N = bank.labels_N.to(query_QF.device)
    num_classes = int(bank.labels_N.max()) + 1
    predicted = [torch.zeros(0, dtype=torch.int64, device=query_QF.device)]
    for vote_qK, row_qK in zip(vote_QK.split(_QUERIES), near.rows.split(_QUERIES), strict=True):  # all (Q, C) can be 10 GB
        votes_qC = vote_qK.new_zeros((len(vote_qK), num_classes))
        predicted.append(votes_qC.scatter_add_(1, labels_N[row_qK], vote_qK).argmax(dim=1))
    return torch.cat(predicted)


def knn_accuracy(bank: Features, queries: Features, k: int, temperature: float, device: torch.device | str = "cpu") -> float:
    """Percent of the queries whose class the bank's weighted k nearest neighbours give.

    Cosine similarity, votes exp(cosine / temperature); k beyond the bank is clipped to it. Raises DataError for sets
    without labels.
    """
    require_labels("train", bank)
    require_labels("test", queries)
    predicted = classify(bank, queries.features_NF.to(device), k, temperature).cpu()
    return 100 * float((predicted == queries.labels_N).double().mean())


class Knn(EvaluationProtocol):
    """The share of test images whose class the weighted nearest neighbours in the train split give."""

    name, title = "knn", "kNN"

    def run(self, subject: Subject) -> dict[str, float]:
        k, temperature = usable_k(subject.settings.knn_k, len(subject.bank)), subject.settings.knn_temperature
        accuracy = knn_accuracy(subject.bank, subject.queries, k, temperature, subject.device)
        return accuracy_metrics(accuracy, len(subject.queries))

    def settings(self, subject: Subject) -> dict[str, Any]:
        k = usable_k(subject.settings.knn_k, len(subject.bank))
        return {"k": k, "temperature": subject.settings.knn_temperature, "bank_images": len(subject.bank)}

    def describe(self, settings: Mapping[str, Any]) -> str:
        k, temperature, bank = settings["k"], settings["temperature"], settings["bank_images"]
        return f"weighted kNN with K = {k:g}, τ = {temperature:g} in a bank of {bank:,.0f} train images"

    def note(self, subject: Subject) -> str:
        requested, bank_images = subject.settings.knn_k, len(subject.bank)
        k = usable_k(requested, bank_images)
        if k == requested:
            return ""
        return f"evaluation.knn_k is {requested}, more than a third of the bank of {bank_images:,} images: kNN uses K = {k}."
