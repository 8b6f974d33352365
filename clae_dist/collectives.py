"""torch's collectives on one tensor a rank, under the names that this torch has: newer ones warn of those before 2.14."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def all_gather(everyone: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Fill `everyone` (W·B, …) with the contiguous `own` (B, …) of all W ranks, in the order of ranks. Collective."""
    _all_gather(everyone, own, group=group)


def reduce_scatter(own: torch.Tensor, everyone: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Fill `own` (B, …) with this rank's part of the sum over ranks of the contiguous `everyone` (W·B, …). Collective."""
    _reduce_scatter(own, everyone, group=group)


def _named(new: str, old: str) -> Any:
    return getattr(dist, new) if hasattr(dist, new) else getattr(dist, old)


_all_gather = _named("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")
