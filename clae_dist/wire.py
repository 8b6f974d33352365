"""Network traffic: the collectives of a call, in whatever code, and the time per byte.

# W ranks. Bytes are those that a rank sends in ring algorithms, which need the fewest, averaged over the ranks:
#   all-gather, reduce-scatter, all-to-all   (W − 1)/W of the whole buffer (the parts of all ranks)
#   all-reduce                               twice that of the buffer
#   broadcast, reduce                        (W − 1)/W of the buffer: W − 1 ranks receive it, or give it
#   scatter, gather                          (W − 1)/W of one part
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# torch's name of the operation without underscores → how many times (W − 1)/W of the whole buffer a rank sends. The whole
# buffer is the largest of the operation's lists of tensors.
_SHARES = {
    "allgather": 1,
    "allgatherbase": 1,
    "allgatherintotensorcoalesced": 1,
    "allgathercoalesced": 1,
    "reducescatter": 1,
    "reducescatterbase": 1,
    "reducescattertensorcoalesced": 1,
    "alltoall": 1,
    "alltoallbase": 1,
    "allreduce": 2,
    "allreducecoalesced": 2,
    "broadcast": 1,
    "reduce": 1,
    "scatter": 1,
    "gather": 1,
}
_OF_A_PART = {"scatter", "gather"}  # the root lists the whole buffer, the others one part of it
_FREE = {"barrier", "monitoredbarrier", "waittensor"}  # they carry no data


@dataclass
class Traffic:
    """Collectives in order: name, and the bytes that a rank sends."""

    num_ranks: int
    sent: list[tuple[str, float]] = field(default_factory=list)

    @property
    def wire_bytes(self) -> float:
        return sum(num_bytes for _, num_bytes in self.sent)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.sent]

    def add(self, name: str, tensors: Sequence[Any]) -> None:
        """`tensors`: the arguments of one collective, lists of tensors or tensors. Raises ValueError for an unknown one."""
        if name in _FREE:
            return
        if name not in _SHARES:
            raise ValueError(f"collective {name!r} is unknown (wire.py); add how much it sends.")
        self.sent.append((name, sent_bytes(name, buffer_bytes(name, tensors), self.num_ranks)))


def buffer_bytes(name: str, tensors: Sequence[Any]) -> int:
    """Bytes of the buffer whose share a rank sends (see the top of this file), of the arguments of one collective."""
    sizes = [size for argument in tensors if (size := _num_bytes(argument))]
    return min(sizes) if name in _OF_A_PART else max(sizes)


def sent_bytes(name: str, buffer: float, num_ranks: int) -> float:
    """Bytes that a rank sends in a collective of a buffer."""
    return _SHARES[name] * buffer * (num_ranks - 1) / num_ranks


def carries_data(name: str) -> bool:
    """False for barriers and waits."""
    return name not in _FREE


def _num_bytes(argument: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor))


class CountTraffic(TorchDispatchMode):
    """Context that counts every collective of this rank, also in backward passes."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self.traffic = Traffic(num_ranks)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace in ("c10d", "_c10d_functional"):
            self.traffic.add(operation._schema.name.split("::")[1].replace("_", ""), args)
        return operation(*args, **(kwargs or {}))


# ---- the network ----


@dataclass(frozen=True)
class Network:
    """Seconds of a collective of n bytes on the wire: α + β n."""

    alpha_s: float
    beta_s_per_byte: float
    worst: float  # the largest error of the fit, relative to the measured time

    def seconds(self, wire_bytes: float) -> float:
        return self.alpha_s + self.beta_s_per_byte * wire_bytes


def fit(wire_bytes: Sequence[float], seconds: Sequence[float]) -> Network:
    """Least squares of relative errors, so that small messages, which determine α, count as much as large ones. α, β ≥ 0."""
    n, t = torch.tensor(wire_bytes, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    terms = torch.stack([1 / t, n / t], 1)
    alpha, beta = torch.linalg.lstsq(terms, torch.ones(len(t), 1, dtype=torch.float64)).solution.flatten().tolist()
    if alpha < 0:
        alpha, beta = 0.0, float((n / t).sum() / (n / t).square().sum())
    elif beta < 0:
        alpha, beta = float((1 / t).sum() / (1 / t).square().sum()), 0.0
    return Network(alpha, beta, float(((alpha + beta * n - t) / t).abs().max()))
