"""Seconds of a collective between ranks: latency by NCCL's own model of its steps, bytes by the slowest link of a ring.

# W ranks on M nodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from clae_dist.planner.table import LINKS_REACH, Chip, Wires
from clae_dist.planner.work import Message
from clae_dist.wire import Network, sent_bytes

# Microseconds of NCCL's LL protocol (small messages): a collective itself, and each step over a link.
# Reference: NCCL, src/graph/tuning.cc (baseLat, hwLat, ncclTopoTuneModel).
_BASE_US = {"ring": 3.6, "tree": 4.4}
_STEP_US = {
    "ring": {"nvlink": 0.47, "pci": 1.0, "network": 2.7},
    "tree": {"nvlink": 0.52, "pci": 1.0, "network": 5.0},
}
_BETWEEN_NODES = 1.8  # a step within a node takes longer where others leave it


@dataclass(frozen=True)
class Links:
    """The links between the ranks of a run. `measured` has a latency and a rate for a kind of collective and its ranks."""

    chip: Chip
    per_node: int
    wires: Wires | None = None
    measured: Mapping[tuple[str, int], Network] = field(default_factory=dict)

    def nodes(self, ranks: int) -> int:
        return -(-ranks // self.per_node)

    def seconds(self, message: Message) -> float:
        """Seconds of one collective, of all its ranks."""
        if message.ranks < 2:
            return 0.0
        sent = sent_bytes(message.kind, message.bytes, message.ranks)
        measured = self._measured(message)
        if measured is not None:
            return measured.seconds(sent)
        return self._latency_s(message) + sent / self._bytes_per_s(message.ranks)

    def _measured(self, message: Message) -> Network | None:
        """Of as many ranks; else of the next number of ranks that was measured, on the same node."""
        kind = "all_gather" if message.kind.startswith("allgather") else "reduce_scatter"
        kind = "all_reduce" if message.kind.startswith("allreduce") else kind
        known = {ranks: network for (name, ranks), network in self.measured.items() if name == kind}
        if message.ranks in known:
            return known[message.ranks]
        if not known or (self.chip.is_gpu and (self.wires is not None or self.nodes(message.ranks) > 1)):
            return None
        nearest = min(known, key=lambda ranks: abs(math.log(ranks / message.ranks)))
        network = known[nearest]
        return Network(network.alpha_s * (message.ranks - 1) / (nearest - 1), network.beta_s_per_byte, network.worst)

    def _bytes_per_s(self, ranks: int) -> float:
        """The rate of a rank in a ring of these ranks, bounded by its own link and by its share of the network."""
        inside = LINKS_REACH * self.chip.link_bytes_per_s
        if self.nodes(ranks) == 1:
            return inside
        assert self.wires is not None, "more than one node without a network"
        outside = LINKS_REACH * self.wires.of_node(min(ranks, self.per_node))
        return min(inside, outside) if min(ranks, self.per_node) > 1 else outside

    def _latency_s(self, message: Message) -> float:
        ranks, nodes = message.ranks, self.nodes(message.ranks)
        link = "nvlink" if self.chip.link == "nvlink" else "pci"
        slower = _BETWEEN_NODES if nodes > 1 else 1.0
        passes = 2 if message.kind.startswith("allreduce") else 1
        steps, outside = passes * (ranks - 1), passes * (nodes - 1)
        ring = _STEP_US["ring"]
        times = [_BASE_US["ring"] + (steps - outside) * slower * ring[link] + outside * ring["network"]]
        if message.kind.startswith("allreduce"):
            tree = _STEP_US["tree"]
            hops = (ranks / nodes - 1) * slower * tree[link] + math.ceil(math.log2(nodes)) * tree["network"]
            times.append(_BASE_US["tree"] + 2 * hops)
        return 1e-6 * min(times)
