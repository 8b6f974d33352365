"""Retrieval of images of the same class: mean average precision and recall at k.

# Q queries, N images of the gallery, F width of the features
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from clae_dist.config.rules import Section, setting
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject

_QUERIES = 256  # ranked at once


@dataclass(frozen=True)
class Retrieval:
    """Shares over the queries that have an image of their class in the gallery; `queries` is their number."""

    mean_average_precision: float
    recall_at: dict[int, float]
    queries: int


def retrieve(features_NF: torch.Tensor, labels_N: torch.Tensor, query_rows_Q: torch.Tensor, ks: Sequence[int]) -> Retrieval:
    """Rank, for every query, all other images by cosine; an image of the query's class is relevant.

    Recall at k is that of metric learning: the share of queries with a relevant image among the first k. Among equal cosines
    the lower row comes first. Reference: Musgrave et al. 2020 (recall), Manning et al. 2008, chapter 8 (average precision).
    """
    features_NF = F.normalize(features_NF, dim=1)
    precision, hits, queries = 0.0, dict.fromkeys(ks, 0), 0
    for rows_q in query_rows_Q.split(_QUERIES):
        cosine_qN = features_NF[rows_q] @ features_NF.T
        cosine_qN.scatter_(1, rows_q[:, None], -torch.inf)  # itself comes last and is not counted
        order_qN = cosine_qN.sort(dim=1, descending=True, stable=True).indices[:, :-1]
        relevant_qN = labels_N[order_qN] == labels_N[rows_q][:, None]
        relevant_qN = relevant_qN[relevant_qN.any(1)]
        found_qN = relevant_qN.cumsum(1)
        rank_N = torch.arange(1, relevant_qN.shape[1] + 1, device=found_qN.device)
        per_query = (found_qN / rank_N.double() * relevant_qN).sum(1) / found_qN[:, -1]
        precision += float(per_query.sum())
        for k in ks:
            hits[k] += int(found_qN[:, min(k, found_qN.shape[1]) - 1].gt(0).sum())
        queries += len(relevant_qN)
    return Retrieval(precision / max(1, queries), {k: hit / max(1, queries) for k, hit in hits.items()}, queries)


@dataclass(frozen=True)
class RetrievalSettings(Section, prefix="retrieval"):
    """Settings of the protocol `retrieval`."""

    queries: int = setting(10_000, ge=1, help="Test images that are queries, of more a choice by the seed.")
    ranks: tuple[int, ...] = setting((1, 5, 10), ge=1, help="Values of k of the recall at k.")


class RetrievalProtocol(EvaluationProtocol):
    """Retrieval of test images of the query's class among all other test images."""

    name, title = "retrieval", "retrieval"
    Settings = RetrievalSettings

    def run(self, subject: Subject) -> dict[str, float]:
        gallery = subject.queries
        rows = torch.arange(len(gallery))
        if self.own.queries < len(gallery):
            rows = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(subject.seed))
            rows = rows[: self.own.queries].sort().values
        features_NF, labels_N = gallery.features_NF.to(subject.device), gallery.labels_N.to(subject.device)
        result = retrieve(features_NF, labels_N, rows.to(subject.device), self.own.ranks)
        recall = {f"recall_at_{k}": 100 * share for k, share in result.recall_at.items()}
        return {"map": 100 * result.mean_average_precision, **recall, "queries": float(result.queries)}

    def describe(self, settings: Mapping[str, Any]) -> str:
        return "mean average precision of test images as queries for test images of their class, by cosine"
