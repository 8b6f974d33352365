"""The work of one training step on one rank: operations, bytes, collectives and live memory, by part of the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

NO_PRODUCT = ""  # dtype of kernels that are no products: their bytes determine their time


@dataclass(frozen=True)
class Bin:
    """Kernels that are alike: the part of the step, the dtype of the product, and log2 of its operations a byte."""

    part: str
    dtype: str
    intensity: int


@dataclass
class Amount:
    """The sum over the kernels of a bin."""

    flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0

    def add(self, flops: float, num_bytes: float, kernels: float = 1.0) -> None:
        self.flops += flops
        self.bytes += num_bytes
        self.kernels += kernels


@dataclass(frozen=True)
class Message:
    """Collectives that are alike: where in the step, torch's name, bytes of the buffer, and the ranks that take part."""

    part: str
    kind: str
    bytes: int
    ranks: int


@dataclass(frozen=True)
class Live:
    """Bytes that are live at one moment of the step, by owner: weights, gradients, optimiser, images, activations, loss, …"""

    at: str  # the part of the step
    bytes: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


@dataclass
class Work:
    """The work of a step. `moments` are those that can be the peak, whatever a backend shards."""

    bins: dict[Bin, Amount] = field(default_factory=dict)
    messages: dict[Message, float] = field(default_factory=dict)
    moments: list[Live] = field(default_factory=list)
    forwards: float = 0.0  # of the encoder
    forwards_with_graph: float = 0.0  # whose backward gathers sharded parameters again
    trained_forwards: float = 0.0  # of these, those that fill parameter gradients
    trained_backwards: float = 0.0  # passes, of which the last one reduces

    def of(self, parts: Iterable[str]) -> Amount:
        """The sum over all kernels of these parts."""
        total, wanted = Amount(), set(parts)
        for one, amount in self.bins.items():
            if one.part in wanted:
                total.add(amount.flops, amount.bytes, amount.kernels)
        return total

    @property
    def parts(self) -> list[str]:
        return list(dict.fromkeys(one.part for one in self.bins))

    @property
    def flops(self) -> float:
        return sum(amount.flops for amount in self.bins.values())


def weights_of_parabola(first: int, count: int) -> tuple[float, float, float]:
    """Weights of the values at `first`, `first` + 1 and `first` + 2 whose sum is that of their parabola at `count`.

    The sums of a step grow with the square of the rows at most (the loss): exact but for chunks.
    """
    x = count - first
    return (x - 1) * (x - 2) / 2, -x * (x - 2), x * (x - 1) / 2


def mixed(traced: Sequence[Work], weights: Sequence[float]) -> Work:
    """The weighted sum of several steps, none of it negative."""

    def of(values: Iterable[float]) -> float:
        return max(0.0, sum(weight * value for weight, value in zip(weights, values, strict=True)))

    work = Work()
    for one in dict.fromkeys(key for step in traced for key in step.bins):
        each = [step.bins.get(one, Amount()) for step in traced]
        work.bins[one] = Amount(of(a.flops for a in each), of(a.bytes for a in each), of(a.kernels for a in each))
    groups = [_by_kind(step) for step in traced]
    for key in dict.fromkeys(key for group in groups for key in group):
        count, total = (of(group.get(key, (0.0, 0.0))[number] for group in groups) for number in (0, 1))
        if count > 0:
            part, kind, ranks = key
            work.messages[Message(part, kind, round(total / count), ranks)] = count
    for name in ("forwards", "forwards_with_graph", "trained_forwards", "trained_backwards"):
        setattr(work, name, of(getattr(step, name) for step in traced))
    places = [{moment.at: moment.bytes for moment in step.moments} for step in traced]
    for at in (moment.at for moment in traced[-1].moments):
        if all(at in place for place in places):
            owners = dict.fromkeys(owner for place in places for owner in place[at])
            work.moments.append(Live(at, {owner: of(place[at].get(owner, 0.0) for place in places) for owner in owners}))
    return work


def _by_kind(work: Work) -> dict[tuple[str, str, int], tuple[float, float]]:
    totals: dict[tuple[str, str, int], tuple[float, float]] = {}
    for message, count in work.messages.items():
        key = message.part, message.kind, message.ranks
        number, num_bytes = totals.get(key, (0.0, 0.0))
        totals[key] = number + count, num_bytes + count * message.bytes
    return totals
