"""Effective rank of a matrix of embeddings, from its singular values.

# n rows, D width
"""

from __future__ import annotations

import torch

_ROWS = 8192  # in float64 at once
_EPSILON = 1e-7  # in RankMe's shares


def rank_me(rows_nD: torch.Tensor) -> float:
    """RankMe: exp of the entropy of the singular values' shares, of the un-centred matrix. Reference: Garrido et al. 2023.

    1 for rows on one line, D for orthogonal columns of equal norm; NaN for rows that are not finite. The paper uses n of at
    least 25,600.
    """
    # Eigenvalues of the smaller Gram matrix in float64: exact to about 1e-8 of the largest singular value. On the CPU, where a
    # small matrix takes less time than to start the GPU's solver library.
    small = gram(rows_nD if len(rows_nD) >= rows_nD.shape[1] else rows_nD.T).cpu()
    if not small.isfinite().all():
        return float("nan")
    values = torch.linalg.eigvalsh(small).clamp_min(0).sqrt()
    share = values / values.sum().clamp_min(1e-300) + _EPSILON
    return float((-(share * share.log()).sum()).exp())


def gram(rows_nD: torch.Tensor, centre: bool = False) -> torch.Tensor:
    """XᵀX (D, D) in float64, of blocks of rows."""
    width = rows_nD.shape[1]
    mean_D = torch.zeros(width, dtype=torch.float64, device=rows_nD.device)
    if centre:
        mean_D = torch.stack([block.double().sum(0) for block in rows_nD.split(_ROWS)]).sum(0) / len(rows_nD)
    gram_DD = torch.zeros((width, width), dtype=torch.float64, device=rows_nD.device)
    for block_bD in rows_nD.split(_ROWS):
        centred_bD = block_bD.double() - mean_D
        gram_DD += centred_bD.T @ centred_bD
    return gram_DD
