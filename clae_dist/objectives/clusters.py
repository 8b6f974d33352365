"""An online clustering of unit rows by cosine, and a contrastive loss with hard and false negatives from it.

# B rows on this rank, N rows on all ranks, C centroids, D embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from clae_dist.objectives.softmax import at_least_float32


def mean_similarity(rows_ND: torch.Tensor) -> torch.Tensor:
    """The mean cosine of different rows."""
    count = len(rows_ND)
    return (rows_ND.sum(0).square().sum() - rows_ND.square().sum()) / (count * (count - 1))


def farthest_points(rows_ND: torch.Tensor, count: int) -> torch.Tensor:
    """(C, D): the first row, then each time the row whose nearest chosen row is the least similar."""
    chosen = [rows_ND[0]]
    nearest_N = rows_ND @ chosen[0]
    for _ in range(count - 1):
        chosen.append(rows_ND[nearest_N.argmin()])
        nearest_N = torch.maximum(nearest_N, rows_ND @ chosen[-1])
    return torch.stack(chosen)


def moved(centroids_CD: torch.Tensor, rows_ND: torch.Tensor, rate: float) -> torch.Tensor:
    """Each centroid towards the sum of the rows that it is nearest to; one without rows stays.

    The sums are a matrix product: the same bits on every rank, which scattered additions on a GPU would not have.
    """
    nearest_N = _similarities(rows_ND, centroids_CD).argmax(1)
    members_NC = (nearest_N[:, None] == torch.arange(len(centroids_CD), device=nearest_N.device)).to(rows_ND.dtype)
    stepped_CD = (1 - rate) * centroids_CD + rate * members_NC.T @ rows_ND
    return torch.where(members_NC.any(0)[:, None], stepped_CD, centroids_CD)


def clustered_loss(
    a_BD: torch.Tensor,
    b_BD: torch.Tensor,
    views: tuple[torch.Tensor, torch.Tensor],
    centroids_CD: torch.Tensor,
    started: torch.Tensor,
    start: int,
    temperature: float,
    margin: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of the InfoNCE of a to b with hard negatives, and of the margins of false negatives.

    Margins are a mean over all N² pairs, of which only those of one cluster count. Before the clustering has `started` there
    are neither hard nor false negatives.

    Args:
        views: all rows (N, D) of a, constant, and of b, with gradient.
    """
    (near, far), dtype = margin, torch.promote_types(a_BD.dtype, torch.float32)
    a, b, all_a, all_b = map(at_least_float32, (a_BD, b_BD, *views))
    with torch.no_grad():
        centroids_CD = F.normalize(centroids_CD.to(dtype), dim=1)
        cluster_N, second_N = _similarities(all_a, centroids_CD).topk(2, 1).indices.T
        rows = torch.arange(len(a), device=a.device)
        same_BN = (cluster_N[start : start + len(a), None] == cluster_N) & started
        same_BN[rows, start + rows] = False
    cosine_BN = a @ all_b.T
    hard_BN = (a @ centroids_CD[second_N].T).masked_fill(~started, -torch.inf)
    positive_B = (a * b).sum(1)
    loss = (torch.cat([cosine_BN, hard_BN], 1) / temperature).logsumexp(1) - positive_B / temperature
    more_BN = cosine_BN - positive_B[:, None]
    outside_BN = (more_BN + near).relu() + (-more_BN - far).relu()
    return loss.mean(), torch.where(same_BN, outside_BN, 0.0).mean()


def _similarities(rows_ND: torch.Tensor, centroids_CD: torch.Tensor) -> torch.Tensor:
    return rows_ND @ F.normalize(centroids_CD, dim=1).to(rows_ND.dtype).T
