"""Contrastive objectives: my rows, all rows, where mine start. No ranks, no collectives, no state.

# B  rows on this rank, N rows on all ranks, D embedding width. Rows are unit length: their products are cosines.
# a, b  the two views. Mine are rows start … start + B of all.

An objective returns the mean over *its own* anchors against all N rows. With a gather whose backward sums over ranks, and
a backend that averages parameter gradients over ranks, that is the gradient of the global batch's mean loss.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F


class Objective(Protocol):
    def __call__(
        self,
        a_BD: torch.Tensor,
        b_BD: torch.Tensor,
        all_a_ND: torch.Tensor,
        all_b_ND: torch.Tensor,
        start: int,
        temperature: float,
    ) -> torch.Tensor: ...


def nt_xent(
    a_BD: torch.Tensor,
    b_BD: torch.Tensor,
    all_a_ND: torch.Tensor,
    all_b_ND: torch.Tensor,
    start: int,
    temperature: float,
) -> torch.Tensor:
    """NT-Xent (Chen et al. 2020, equation 1), the mean over the 2B anchors of this rank. A scalar, at least float32.

    Every row of both views is an anchor; its positive is the other view of its image, its negatives all other rows. For
    2 ranks of 2 rows, the positives of rank 1's anchors (start = 2) among the columns [all_a | all_b]:

                 a0 a1 a2 a3 b0 b1 b2 b3
            a2 [  0  0  -  0  0  0  1  0 ]     -  the anchor itself, left out
            a3 [  0  0  0  -  0  0  0  1 ]
            b2 [  0  0  1  0  0  0  -  0 ]
            b3 [  0  0  0  1  0  0  0  - ]
    """
    num_mine, num_all = a_BD.shape[0], all_a_ND.shape[0]
    anchors, columns = _at_least_float32(torch.cat([a_BD, b_BD]), torch.cat([all_a_ND, all_b_ND]))
    similarity = anchors @ columns.T / temperature
    mine = start + torch.arange(num_mine, device=a_BD.device)
    itself, positive = torch.cat([mine, mine + num_all]), torch.cat([mine + num_all, mine])
    similarity = similarity.scatter(1, itself[:, None], -torch.inf)
    return F.cross_entropy(similarity, positive)


def instance(
    a_BD: torch.Tensor,
    b_BD: torch.Tensor,
    all_a_ND: torch.Tensor,
    all_b_ND: torch.Tensor,
    start: int,
    temperature: float,
) -> torch.Tensor:
    """Instance discrimination across views ("Plain" in Ho & Vasconcelos 2020): anchors a, columns b, one direction.

    For 2 ranks of 2 rows, the positives of rank 1's anchors (start = 2):

                 b0 b1 b2 b3
            a2 [  0  0  1  0 ]
            a3 [  0  0  0  1 ]
    """
    anchors, columns = _at_least_float32(a_BD, all_b_ND)
    positive = start + torch.arange(a_BD.shape[0], device=a_BD.device)
    return F.cross_entropy(anchors @ columns.T / temperature, positive)


def _at_least_float32(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A cosine over a small temperature is too coarse in bfloat16."""
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


OBJECTIVES: dict[str, Objective] = {"nt_xent": nt_xent, "instance": instance}
