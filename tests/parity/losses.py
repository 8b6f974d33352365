"""Distributed losses as people have written them: right ones, and the historic mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd import Function

Gather = Callable[[torch.Tensor], torch.Tensor]


def all_gather(rows: torch.Tensor) -> torch.Tensor:
    """Of all ranks, without a gradient."""
    slots = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(slots, rows.contiguous())
    return torch.cat(slots)


def own_slot(rows: torch.Tensor) -> torch.Tensor:
    return rows.chunk(dist.get_world_size())[dist.get_rank()]


class _Sums(Function):
    """The right gather: its backward sums over ranks."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return all_gather(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        everyone = gradients[0].clone()
        dist.all_reduce(everyone)
        return own_slot(everyone)


class _SumsOwnSlots(_Sums):
    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        own = own_slot(gradients[0]).clone()
        dist.all_reduce(own)
        return own


def put_back(rows: torch.Tensor) -> torch.Tensor:
    slots = list(all_gather(rows).chunk(dist.get_world_size()))
    slots[dist.get_rank()] = rows
    return torch.cat(slots)


def functional(rows: torch.Tensor) -> torch.Tensor:
    """torch's own gather with a gradient, in whatever form this version has."""
    import torch.distributed._functional_collectives as collectives

    return collectives.all_gather_tensor_autograd(rows.contiguous(), 0, dist.group.WORLD)


def nt_xent(a: torch.Tensor, b: torch.Tensor, gather: Gather, offset: int | None = None, scale: float = 1.0) -> torch.Tensor:
    """Mean over this rank's anchors of either view."""
    everyone = (gather(a), gather(b))
    anchors = torch.arange(len(a)) + (dist.get_rank() * len(a) if offset is None else offset)
    halves = []
    for rows, own, other in ((a, *everyone), (b, *everyone[::-1])):
        logits = torch.cat([rows @ other.T, rows @ own.T], 1) / 0.5
        logits[torch.arange(len(a)), len(own) + anchors] = -torch.inf
        halves.append(F.cross_entropy(logits, anchors))
    return scale * (halves[0] + halves[1]) / 2


def right(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return nt_xent(a, b, _Sums.apply)


def right_functional(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return nt_xent(a, b, functional)


def right_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return nt_xent(a.float(), b.float(), _Sums.apply)


def local(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return nt_xent(a, b, lambda rows: rows, offset=0)


def wrong_offset(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return nt_xent(a, b, _Sums.apply, offset=0)


def detached(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return nt_xent(a, b, all_gather)


def detached_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return nt_xent(a.float(), b.float(), all_gather)


def own_rows_only(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return nt_xent(a, b, put_back)


def all_anchors(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Every rank computes the whole loss, with live rows of its own: W times too small."""
    return nt_xent(put_back(a), put_back(b), lambda rows: rows, offset=0)


class TwiceSummed(torch.nn.Module):
    """The whole loss on every rank, of rows whose gradient is summed over ranks, and multiplied by W: W times too large."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        whole = nt_xent(_Sums.apply(a), _Sums.apply(b), lambda rows: rows, offset=0)  # type: ignore[no-untyped-call]
        return whole + (dist.get_world_size() - 1) * (whole - whole.detach())


def own_slot_of_all_reduce(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return nt_xent(a, b, _SumsOwnSlots.apply)


class WithLabels(torch.nn.Module):
    """All rows with the number of each one's image, as metric-learning packages take them."""

    def __init__(self, temperature: float, world_size: int) -> None:
        super().__init__()
        self.temperature, self.world_size = temperature, world_size

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor, power: float) -> torch.Tensor:
        assert self.world_size == dist.get_world_size()
        rows, ids = _Sums.apply(embeddings), all_gather(labels)  # type: ignore[no-untyped-call]
        logits = embeddings @ rows.T / self.temperature
        place = torch.arange(len(labels)) + dist.get_rank() * len(labels)
        itself = torch.zeros_like(logits, dtype=torch.bool)
        itself[torch.arange(len(labels)), place] = True
        positive = (labels[:, None] == ids[None]) & ~itself
        chances = F.log_softmax(logits.masked_fill(itself, -torch.inf), 1)
        return -(chances.masked_fill(~positive, 0).sum(1) ** power).mean()


def two_numbers(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(1)


def raises(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel")
