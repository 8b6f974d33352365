"""The limit of a step, and the changes that would help most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from clae_dist.config import Config
from clae_dist.planner.costs import Costs, Prices, best_interval_s, goodput_of
from clae_dist.planner.network import Links
from clae_dist.planner.record import STATISTICS
from clae_dist.planner.timing import Rates, StepTime, step_time
from clae_dist.planner.trace import Traced
from clae_dist.planner.work import NO_PRODUCT, Amount, Bin, Message, Work

_LEAST_GAIN = 0.005  # of the run's time
_HEADINGS = {
    "gather": "gathering rows over ranks",
    "statistics": "batch statistics over ranks",
    "reduction": "averaging gradients over ranks",
    "parameters": "gathering sharded parameters",
    "waits": "the host, which launches kernels one by one",
}


@dataclass(frozen=True)
class Change:
    """A change, and the share of the run's time that it would save."""

    what: str
    saves: float


def limit_of(time: StepTime) -> str:
    """The largest part, where computation counts as one."""
    parts = {**time.exposed, "waits": time.waits}
    computed = sum(time.computed.values())
    name = max(parts, key=lambda part: parts[part])
    if parts[name] > computed:
        return f"{_HEADINGS[name]} ({parts[name] / time.total:.0%} of a step)"
    return f"computation ({computed / time.total:.0%} of a step)"


def changes(
    config: Config, traced: Traced, rates: Rates, links: Links, costs: Costs, prices: Prices, crowding: float
) -> list[Change]:
    """The three changes that save the most time, of those that this step allows. None of them changes the algorithm but
    where its text says so."""
    before = step_time(traced, config, rates, links, crowding=crowding).total

    def saved(config: Config = config, traced: Traced = traced, links: Links = links) -> float:
        return 1 - step_time(traced, config, rates, links, crowding=crowding).total / before

    found = [*_of_kernels(config, traced, links, saved), *_of_links(config, traced, links, saved)]
    found += _of_checkpoints(costs, prices, links.nodes(traced.ranks))
    return sorted((one for one in found if one.saves > _LEAST_GAIN), key=lambda one: -one.saves)[:3]


def _of_kernels(config: Config, traced: Traced, links: Links, saved: object) -> Iterator[Change]:
    assert callable(saved)
    if not config.train.compile and links.chip.is_gpu:
        compiled = replace(config, train=replace(config.train, compile=True))
        yield Change("train.compile=true: fewer kernels to launch, a third of them as assumed", saved(config=compiled))
    if traced.precision == "float32" and links.chip.is_gpu and links.chip.rate("bfloat16", tf32=False):
        work = _changed(traced.work, _in_bfloat16(traced.work))
        yield Change("train.precision=bfloat16: other rounding", saved(traced=replace(traced, work=work)))
    if config.train.activation_checkpointing:
        work = _changed(traced.work, {one: _less(amount, one) for one, amount in traced.work.bins.items()})
        yield Change("train.activation_checkpointing=false, if it fits", saved(traced=replace(traced, work=work)))


def _in_bfloat16(work: Work) -> dict[Bin, Amount]:
    changed: dict[Bin, Amount] = {}
    for one, amount in work.bins.items():
        encoder = one.part in ("attack", "forward", "backward")
        target = replace(one, dtype="bfloat16", intensity=one.intensity + 1) if one.dtype and encoder else one
        changed.setdefault(target, Amount()).add(amount.flops, amount.bytes * (0.5 if encoder else 1.0), amount.kernels)
    return changed


def _less(amount: Amount, one: Bin) -> Amount:
    """A backward without the second forward: two thirds of its products."""
    share = 2 / 3 if one.part == "backward" and one.dtype != NO_PRODUCT else 1.0
    return Amount(amount.flops * share, amount.bytes * share, amount.kernels)


def _changed(work: Work, bins: dict[Bin, Amount]) -> Work:
    return replace(work, bins=bins)


def _of_links(config: Config, traced: Traced, links: Links, saved: object) -> Iterator[Change]:
    assert callable(saved)
    nodes = links.nodes(traced.ranks)
    if traced.ranks > 1 and any(message.part == STATISTICS for message in traced.work.messages):
        near = min(traced.ranks, links.per_node)
        if nodes > 1:
            work = replace(traced.work, messages=_statistics_of(traced.work, near))
            text = f"model.norm_group=node: batch statistics of the {near} ranks of a node"
            yield Change(text, saved(traced=replace(traced, work=work)))
        work = replace(traced.work, messages=_statistics_of(traced.work, 1))
        yield Change("model.norm=local: batch statistics of a rank's own rows", saved(traced=replace(traced, work=work)))
    if nodes > 1 and links.wires is not None:
        faster = replace(links, wires=replace(links.wires, bytes_per_s=2 * links.wires.bytes_per_s))
        yield Change("a network of twice the rate", saved(links=faster))
    if config.parallel.backend == "fsdp2" and config.parallel.reshard_after_forward and traced.ranks > 1:
        kept = replace(config, parallel=replace(config.parallel, reshard_after_forward=False))
        yield Change("parallel.reshard_after_forward=false, if it fits", saved(config=kept))
    if traced.ranks > 1:
        larger = step_larger(traced)
        gain = 1 - (1 - saved(traced=larger)) / 2
        yield Change("batch.global_size twice as large: fewer steps an epoch, and other training", gain)


def _statistics_of(work: Work, ranks: int) -> dict[Message, float]:
    """The messages, with batch statistics of `ranks` ranks."""
    changed: dict[Message, float] = {}
    for message, count in work.messages.items():
        target = message
        if message.part == STATISTICS:
            if ranks == 1:
                continue
            size = message.bytes * ranks // message.ranks if message.kind.startswith("allgather") else message.bytes
            target = replace(message, bytes=size, ranks=ranks)
        changed[target] = changed.get(target, 0.0) + count
    return changed


def step_larger(traced: Traced) -> Traced:
    """About the step of a batch twice as large: twice the work of encoder, four times that of the loss."""
    bins = {
        one: Amount(amount.flops * factor, amount.bytes * factor, amount.kernels)
        for one, amount in traced.work.bins.items()
        for factor in (4.0 if one.part == "loss" else 1.0 if one.part == "update" else 2.0,)
    }
    messages = {
        (replace(message, bytes=2 * message.bytes) if message.part in ("loss", "attack") else message): count
        for message, count in traced.work.messages.items()
    }
    return replace(traced, rows=2 * traced.rows, work=replace(traced.work, bins=bins, messages=messages))


def _of_checkpoints(costs: Costs, prices: Prices, nodes: int) -> Iterator[Change]:
    mtbf_s = prices.node_mtbf_h / nodes * 3600
    every_s = best_interval_s(costs.checkpoint_blocks_s, mtbf_s)
    step_s = costs.checkpoint_every_s if costs.steps < 1 else 3600 * costs.hours * costs.goodput / costs.steps
    steps = max(1, round(every_s / step_s))
    gain = 1 - costs.goodput / goodput_of(steps * step_s, costs.checkpoint_blocks_s, mtbf_s)
    yield Change(f"checkpoint.every_steps={steps}", gain)
