"""Seconds of a step by part, from its work, the rates of the chip and the links between ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch

from clae_dist.config import Config
from clae_dist.data.loader import num_views_of
from clae_dist.planner.memory import Sharding
from clae_dist.planner.network import Links
from clae_dist.planner.record import STATISTICS
from clae_dist.planner.table import COMPILED_KERNELS, LAUNCH_S, LEAST_KERNEL_S, MEMORY_REACHES, PRODUCTS_REACH, Chip, Fsdp2Costs
from clae_dist.planner.trace import Traced
from clae_dist.planner.work import NO_PRODUCT, Amount, Bin, Message

COMPUTED = ("augmentation", "attack", "forward", "loss", "backward", "update")
_DDP_BUCKET, _DDP_FIRST_BUCKET = 25 << 20, 1 << 20  # torch's defaults, in bytes
_AUGMENTATION_PASSES = 2.0  # reading uint8 and writing float32, so many times: the limit of the fused kernels
_FUSED_KERNELS = 2


@dataclass(frozen=True)
class Rates:
    """Operations a second by dtype, bytes a second, and seconds of a kernel besides.

    With `overlap`, a product takes the longer of its operations and its bytes, as a data sheet's rates mean; rates that were
    fitted to whole steps have its bytes within.
    """

    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    kernel_s: float
    source: str
    overlap: bool = True
    launch_s: float = 0.0  # of the host, a kernel, beside the device
    fsdp2: Fsdp2Costs = field(default_factory=Fsdp2Costs)
    augment_s: float = 0.0  # of an image, all views; 0: by bytes

    @staticmethod
    def of_table(chip: Chip, *, tf32: bool) -> Rates:
        """Rates that kernels are assumed to reach."""
        rates = {name: PRODUCTS_REACH * chip.rate(name, tf32=tf32) for name in ("bfloat16", "float32", "float64")}
        rates = {name: rate or rates["float32"] / 2 for name, rate in rates.items()}
        source = f"assumed: products reach {PRODUCTS_REACH:.0%} of the data sheet, memory {MEMORY_REACHES:.0%} ({chip.source})"
        return Rates(rates, MEMORY_REACHES * chip.bytes_per_s, LEAST_KERNEL_S, source, launch_s=LAUNCH_S)

    def seconds(self, bins: Iterable[tuple[Bin, Amount]]) -> float:
        return sum(self._of_bin(one, amount) for one, amount in bins)

    def _of_bin(self, one: Bin, amount: Amount) -> float:
        moving = amount.bytes / self.bytes_per_s
        fixed = amount.kernels * self.kernel_s
        if one.dtype == NO_PRODUCT:
            return moving + fixed
        rate = self.flops_per_s.get(one.dtype) or self.flops_per_s["float32"]
        return fixed + (max(amount.flops / rate, moving) if self.overlap else amount.flops / rate)


@dataclass(frozen=True)
class Sample:
    """A measured step on one rank: operations of products, bytes of the other kernels, kernels, and seconds."""

    flops: float
    other_bytes: float
    kernels: float
    seconds: float

    @staticmethod
    def of(bins: Mapping[Bin, Amount], seconds: float) -> Sample:
        other = sum(amount.bytes for one, amount in bins.items() if one.dtype == NO_PRODUCT)
        return Sample(
            sum(amount.flops for amount in bins.values()), other, sum(amount.kernels for amount in bins.values()), seconds
        )


def fit_rates(samples: Sequence[Sample], source: str) -> Rates:
    """Rates by least squares of relative errors, none of them negative: seconds = flops/R + bytes/M + kernels·L.

    Of all sets of these three terms, the one with the smallest error whose rates are positive.
    """
    terms = torch.tensor([[s.flops, s.other_bytes, s.kernels] for s in samples], dtype=torch.float64)
    seconds = torch.tensor([s.seconds for s in samples], dtype=torch.float64)
    scaled = terms / seconds[:, None]
    best, costs = math.inf, [0.0, 0.0, 0.0]
    for count in (1, 2, 3):
        for chosen in combinations(range(3), count):
            if count > len(samples):
                continue
            columns = scaled[:, chosen]
            size = columns.norm(dim=0).clamp_min(1e-300)
            solution = torch.linalg.lstsq(
                columns / size, torch.ones(len(samples), 1, dtype=torch.float64), driver="gelsd"
            ).solution
            error = float((columns / size @ solution - 1).square().sum())
            found = (solution[:, 0] / size).tolist()
            if min(found) >= 0 and error < best - 1e-9:
                best, costs = error, [dict(zip(chosen, found, strict=True)).get(term, 0.0) for term in range(3)]
    flops, num_bytes, kernel = costs
    rate = 1 / flops if flops else math.inf
    return Rates(
        dict.fromkeys(("bfloat16", "float32", "float64"), rate),
        1 / num_bytes if num_bytes else math.inf,
        kernel,
        source,
        overlap=False,
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part. `communicated`: each kind of communication in total; `hidden`: what of it costs nothing."""

    computed: Mapping[str, float]
    communicated: Mapping[str, float]
    hidden: Mapping[str, float] = field(default_factory=dict)
    waits: float = 0.0  # of the device for the host, which launches kernels one by one and has FSDP2's units to manage

    @property
    def exposed(self) -> dict[str, float]:
        return {name: seconds - self.hidden.get(name, 0.0) for name, seconds in self.communicated.items()}

    @property
    def total(self) -> float:
        return sum(self.computed.values()) + sum(self.exposed.values()) + self.waits

    @property
    def parts(self) -> dict[str, float]:
        """All parts that add up to the step."""
        return {**self.computed, **self.exposed, "waits": self.waits}


def step_time(traced: Traced, config: Config, rates: Rates, links: Links, *, crowding: float = 1.0) -> StepTime:
    """Seconds of a step.

    Args:
        crowding: times that computation takes longer because ranks share cores.
    """
    bins = traced.work.bins
    computed = {
        part: crowding * rates.seconds((one, amount) for one, amount in bins.items() if one.part == part) for part in COMPUTED
    }
    computed["augmentation"] = crowding * _augmentation(traced, config, rates)
    fsdp2 = config.parallel.backend == "fsdp2" and traced.ranks > 1
    host_s = 0.0  # of FSDP2, besides launching kernels
    encoder = sum(computed[part] for part in ("attack", "forward", "backward"))
    communicated = {
        "gather": _sum(traced.work.messages, links, lambda part: part != STATISTICS),
        "statistics": _sum(traced.work.messages, links, lambda part: part == STATISTICS),
    }
    hidden: dict[str, float] = {}
    last_pass = computed["backward"] / max(1.0, traced.work.trained_backwards)
    reductions = _reductions(traced, config)
    if reductions:
        times = [count * links.seconds(message) for message, count in reductions]
        if fsdp2:
            times = [own + crowding * _copied(message, rates) for own, (message, _) in zip(times, reductions, strict=True)]
            host_s += _visit(traced, rates) + rates.fsdp2.update_s * traced.num_parameters
        communicated["reduction"] = sum(times)
        if links.chip.is_gpu and config.parallel.backend != "deepspeed":  # a CPU's collectives take its cores
            hidden["reduction"] = min(sum(times[:-1]), last_pass)
    gathers = _parameter_gathers(traced, config)
    if gathers:
        times = [count * links.seconds(message) for message, count in gathers]
        if fsdp2:
            copies = [crowding * count * _copied(message, rates) for message, count in gathers]
            times = [own + copied for own, copied in zip(times, copies, strict=True)]
            host_s += _visit(traced, rates) * sum(count for _, count in gathers) / len(gathers)
        communicated["parameters"] = sum(times)
        if links.chip.is_gpu and config.parallel.backend == "fsdp2":
            hidden["parameters"] = max(0.0, min(sum(times[1:]), encoder - hidden.get("reduction", 0.0)))
    kernels = sum(amount.kernels for amount in bins.values())
    launched = kernels * (COMPILED_KERNELS if config.train.compile else 1.0)
    if links.chip.is_gpu:
        host_s += launched * rates.launch_s
        waits = max(0.0, host_s - sum(computed.values()))
    else:  # the host is the device
        waits = crowding * host_s
    return StepTime(computed, communicated, hidden, waits)


def _visit(traced: Traced, rates: Rates) -> float:
    """Seconds of the host in which FSDP2 gathers or reduces every unit once."""
    return rates.fsdp2.unit_s * len(traced.unit_bytes) + rates.fsdp2.parameter_s * traced.num_parameters


def _copied(message: Message, rates: Rates) -> float:
    """Seconds in which FSDP2 copies a unit from its parameters to the buffer of a message, or from there to them."""
    part = message.bytes / message.ranks
    moved = 2 * (message.bytes + (part if message.kind == "allgatherbase" else 0.0))
    return moved / (rates.fsdp2.copied_bytes_per_s or rates.bytes_per_s)


def _sum(messages: Mapping[Message, float], links: Links, wanted: object) -> float:
    assert callable(wanted)
    return sum(count * links.seconds(message) for message, count in messages.items() if wanted(message.part))


def _augmentation(traced: Traced, config: Config, rates: Rates) -> float:
    if rates.augment_s:
        return rates.augment_s * traced.rows
    if rates.launch_s == 0:  # a CPU, of which only the step was measured
        return 0.0
    pixels = num_views_of(config) * config.data.image_size**2 + config.views.local_crops * config.local_size**2
    return _AUGMENTATION_PASSES * traced.rows * 3 * pixels * (1 + 4) / rates.bytes_per_s + _FUSED_KERNELS * rates.kernel_s


def _reductions(traced: Traced, config: Config) -> list[tuple[Message, float]]:
    """The messages that average gradients over ranks, in their order."""
    ranks, sharding = traced.ranks, Sharding.of(config, traced.ranks)
    if ranks == 1:
        return []
    if config.parallel.backend == "fsdp2":
        found = [
            (Message("backward", "reducescatterbase", size, sharding.weights), 1.0) for size in reversed(traced.unit_bytes)
        ]
        if sharding.weights < ranks:
            share = traced.weight_bytes // sharding.weights
            found.append((Message("backward", "allreduce", share, ranks // sharding.weights), 1.0))
        return found
    if config.parallel.backend == "deepspeed" and sharding.optimiser > 1:
        found = [(Message("backward", "reducescatterbase", traced.weight_bytes, ranks), 1.0)]
        if sharding.weights == 1:
            found.append((Message("update", "allgatherbase", traced.weight_bytes, ranks), 1.0))
        return found
    first = min(_DDP_FIRST_BUCKET, traced.weight_bytes)
    rest = traced.weight_bytes - first
    buckets = [(Message("backward", "allreduce", first, ranks), 1.0)]
    buckets += [(Message("backward", "allreduce", _DDP_BUCKET, ranks), 1.0)] * (rest // _DDP_BUCKET)
    if rest % _DDP_BUCKET:
        buckets.append((Message("backward", "allreduce", rest % _DDP_BUCKET, ranks), 1.0))
    return buckets


def _parameter_gathers(traced: Traced, config: Config) -> list[tuple[Message, float]]:
    """The messages that gather sharded parameters: once a forward, and again in its backward if they were freed."""
    size = Sharding.of(config, traced.ranks).weights
    if size == 1:
        return []
    fsdp2 = config.parallel.backend == "fsdp2"
    again = traced.work.forwards_with_graph if not fsdp2 or config.parallel.reshard_after_forward else 0.0
    share = 2 if traced.precision == "bfloat16" and fsdp2 else 1
    return [
        (Message("forward", "allgatherbase", unit // share, size), traced.work.forwards + again) for unit in traced.unit_bytes
    ]
