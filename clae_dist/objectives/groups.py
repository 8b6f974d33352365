"""Several positives for an anchor: the rows of all images of its group, such as a class.

# B rows on this rank, N rows on all ranks, D embedding width.
"""

from __future__ import annotations

import torch

from clae_dist.objectives.form import UNWRITTEN, Rows
from clae_dist.objectives.softmax import at_least_float32


def same_group(mine_B: torch.Tensor, all_N: torch.Tensor, start: int) -> torch.Tensor:
    """(B, N): true where another image has the group of this rank's image; a negative group is no group.

    2 ranks x 2 images with the groups 0, 1 | 0, 0, on the second rank:

        0  1  2  3
        1  0  0  1   image 2
        1  0  1  0   image 3
    """
    same_BN = (mine_B[:, None] == all_N) & (mine_B[:, None] >= 0)
    rows = torch.arange(len(mine_B), device=mine_B.device)
    same_BN[rows, start + rows] = False
    return same_BN


def spread_positives(a: Rows, b: Rows, same_BN: torch.Tensor, temperature: float) -> torch.Tensor:
    """This rank's share of (similarity to the other view) - (mean similarity to all positives), over the anchors of two views.

    The positives of an anchor are the other view of its image and both views of the images in `same_BN`. Added to NT-Xent it
    makes the supervised contrastive loss. The weights of a pair are equal in both directions, so a row's gradient as a
    positive of others is its gradient as an anchor: it is doubled here, and nothing returns from other ranks.

    Reference: Khosla et al. 2020, Supervised contrastive learning, equation 2 (L_out).
    """
    mine_a, mine_b = at_least_float32(a.mine), at_least_float32(b.mine)
    others_BN = same_BN.to(mine_a.dtype)
    sum_BD = others_BN @ at_least_float32(a.all + b.all).detach()
    share_B1 = 1 / (1 + 2 * others_BN.sum(1, keepdim=True))

    def gain(anchors_BD: torch.Tensor, partners_BD: torch.Tensor) -> torch.Tensor:
        partners_BD = partners_BD.detach()
        return (anchors_BD * (partners_BD - share_B1 * (partners_BD + sum_BD))).sum(1)

    value = (gain(mine_a, mine_b) + gain(mine_b, mine_a)).mean() / (2 * temperature)
    return 2 * value - value.detach()


def grouped_match(
    queries_BD: torch.Tensor,
    all_queries_ND: torch.Tensor,
    keys_ND: torch.Tensor,
    groups_N: torch.Tensor,
    queue: tuple[torch.Tensor, torch.Tensor],
    start: int,
    weight_of_others: float,
    temperature: float,
) -> torch.Tensor:
    """The mean over this rank's queries of -[log p(own key) + β · mean of log p(others of its group)] / (1 + β).

    p is the softmax over all other queries, all keys and the queue. A query without others of its group has its key alone.

    Args:
        queue: rows (K, D) and their groups (K,); rows of the group `UNWRITTEN` are no columns.
        weight_of_others: β. With β = number of others it is the supervised contrastive loss of the queries.
    Reference: Xuan & Zhang 2024, Decoupled contrastive learning for long-tailed recognition.
    """
    queue_KD, queue_groups_K = queue
    z, all_z = at_least_float32(queries_BD), at_least_float32(all_queries_ND)
    mine_B = groups_N[start : start + len(z)]
    rows = torch.arange(len(z), device=z.device)
    own_BN = torch.zeros(len(z), len(groups_N), dtype=torch.bool, device=z.device)
    own_BN[rows, start + rows] = True
    same_BN = same_group(mine_B, groups_N, start)
    in_queue_BK = (mine_B[:, None] == queue_groups_K) & (mine_B[:, None] >= 0)
    blocks = [
        (z @ all_z.T).masked_fill(own_BN, -torch.inf),
        z @ keys_ND.to(z.dtype).T,
        (z @ queue_KD.to(z.dtype).T).masked_fill(queue_groups_K == UNWRITTEN, -torch.inf),
    ]
    similar_BM = torch.cat(blocks, 1) / temperature
    log_p_BM = similar_BM - similar_BM.logsumexp(1, keepdim=True)
    own_B = log_p_BM[rows, len(groups_N) + start + rows]
    others_BM = torch.cat([same_BN, same_BN, in_queue_BK], 1)
    count_B = others_BM.sum(1)
    mean_B = torch.where(others_BM, log_p_BM, 0.0).sum(1) / count_B.clamp(min=1)
    share_B = (count_B > 0).to(z.dtype) * (weight_of_others / (1 + weight_of_others))
    return -((1 - share_B) * own_B + share_B * mean_B).mean()
