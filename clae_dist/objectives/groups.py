"""Several positives for an anchor: the rows of all images of its group, such as a class.

# B rows on this rank, N rows on all ranks, D embedding width.
"""

from __future__ import annotations

import torch

from clae_dist.objectives.form import Rows
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
