"""A plan as lines for people and as an object for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from clae_dist.planner.costs import IMAGES_PER_CORE_S, RESTART_S, WRITTEN_BYTES_PER_S
from clae_dist.planner.measured import RealStep
from clae_dist.planner.plan import Option, RunPlan
from clae_dist.wording import count_of

FORMAT = "clae-dist plan 1"
_GIB, _MIB = 1 << 30, 1 << 20
_UNKNOWN_PRICE = "no --price"


def lines(plan: RunPlan) -> Iterator[str]:
    """The plan as text."""
    request = plan.request
    config, chip = request.config, request.chip
    nodes = request.links.nodes(request.ranks)
    network = f", {request.wires.name} ({request.wires.source})" if request.wires else ""
    yield (
        f"plan of {config.name}: {config.method.name}, {config.model.encoder} at {config.data.image_size} px, batch "
        f"{config.batch.global_size:,} on {count_of(request.ranks, 'rank')} of {chip.name}, {count_of(nodes, 'node')}{network}"
    )
    yield f"rates: {request.rates.source}"
    yield f"links: {_links(plan)}"
    yield f"images: {request.images.count:,}, {request.images.mean_bytes:,.0f} B each ({request.images.source})"
    for option in plan.options:
        yield ""
        yield from _option(option, plan)
    for name, reason in plan.refused.items():
        yield ""
        yield f"{name}: refused: {reason}"
    yield ""
    yield f"over ranks ({plan.options[0].name})"
    yield f"  {'ranks':>7}{'images/s':>12}{'a rank':>9}{'hours':>10}{'money':>12}"
    for point in plan.curve:
        money = f"{point.money:,.0f}" if request.prices.rank_hour else _UNKNOWN_PRICE
        mark = "  more stop paying" if point.ranks == plan.pays_up_to else ""
        a_rank = point.images_per_s / point.ranks
        yield f"  {point.ranks:>7}{point.images_per_s:>12,.0f}{a_rank:>9,.0f}{point.hours:>10,.1f}{money:>12}{mark}"
    if not plan.pays_up_to and len(plan.curve) > 1:
        yield "  every doubling shown is at least 1.5 times as fast"
    yield f"limit: {plan.limit}"
    for number, change in enumerate(plan.changes, start=1):
        yield f"  {number}. {change.what}: saves {change.saves:.0%} of the time"
    if not plan.changes:
        yield "  no change that is known here would save 0.5 % of the time"


def line_of(step: RealStep) -> str:
    """A measured step as text."""
    return (
        f"a real step here as one of {count_of(step.ranks, 'rank')}, without messages: {_seconds(step.seconds)} (spread "
        f"{step.spread:.0%}); peak memory {_bytes(step.peak_bytes)}, planned {_bytes(step.planned_bytes)}"
    )


def _links(plan: RunPlan) -> str:
    links = plan.request.links
    if links.measured:
        return f"measured ({', '.join(plan.request.measured.files)})"
    if plan.request.ranks == 1:
        return "none"
    return "latency by NCCL's model of its steps, 80% of the rate of the slowest link"


def _option(option: Option, plan: RunPlan) -> Iterator[str]:
    time, costs, request = option.time, option.costs, plan.request
    yield f"{option.name}: {_seconds(time.total)} a step, {costs.images_per_s:,.0f} images/s"
    parts = [f"{name} {_seconds(seconds)}" for name, seconds in time.parts.items() if seconds > 1e-7]
    yield f"  time:       {', '.join(parts)}"
    hidden = [f"{_seconds(seconds)} of {name}" for name, seconds in time.hidden.items() if seconds > 1e-7]
    if hidden:
        yield f"  hidden:     {', '.join(hidden)} beside computation"
    memory = option.memory
    sizes = [f"{name} {_bytes(size)}" for name, size in memory.parts.items() if size >= _MIB]
    usable = _bytes(request.usable_bytes)
    yield f"  memory:     {_bytes(memory.total)} of {usable} usable, most in {memory.at}: {', '.join(sizes)}"
    yield f"  micro-batch: at most {option.micro_size} images of a rank's {option.traced.rows} fit"
    rate = "measured" if request.measured.images_per_core_s else f"assuming {IMAGES_PER_CORE_S:g} images/s a core"
    yield f"  a node:     {costs.node_cores:.0f} cores for the images ({rate}), {_bytes(costs.node_read_bytes_per_s)}/s read"
    disk = "measured" if request.measured.written_bytes_per_s else f"assuming {_bytes(WRITTEN_BYTES_PER_S)}/s of a node"
    every = "at the end" if math.isinf(costs.checkpoint_every_s) else f"every {_seconds(costs.checkpoint_every_s)}"
    yield (
        f"  checkpoint: {_bytes(costs.checkpoint_bytes)} {every}; blocks {_seconds(costs.checkpoint_blocks_s)}, committed "
        f"after {_seconds(costs.checkpoint_committed_s)} ({disk})"
    )
    yield (
        f"  failures:   {costs.failures:.2g} expected (a node fails every {request.prices.node_mtbf_h:,.0f} h, a restart takes "
        f"{RESTART_S:g} s), goodput {costs.goodput:.1%}"
    )
    money = (
        f"{costs.money:,.0f} at {request.prices.rank_hour:g} an hour of a rank" if request.prices.rank_hour else _UNKNOWN_PRICE
    )
    energy = f"{costs.energy_kwh:,.1f} kWh of the chips at their largest power" if request.chip.watts else "unknown"
    yield f"  the run:    {count_of(costs.steps, 'step')}, {costs.hours:,.2f} hours; energy {energy}; money {money}"


def as_object(plan: RunPlan) -> dict[str, Any]:
    """The plan for programs. Times in seconds, sizes in bytes."""
    request = plan.request
    return {
        "format": FORMAT,
        "ranks": request.ranks,
        "gpu": request.chip.name,
        "network": request.wires.name if request.wires else None,
        "per_node": request.per_node,
        "nodes": request.links.nodes(request.ranks),
        "rates": request.rates.source,
        "real_step": vars(request.measured.real_step) if request.measured.real_step else None,
        "images": vars(request.images),
        "node_mtbf_h": request.prices.node_mtbf_h,
        "usable_bytes": request.usable_bytes,
        "backends": [_option_object(option) for option in plan.options],
        "refused": plan.refused,
        "curve": [vars(point) for point in plan.curve],
        "pays_up_to": plan.pays_up_to or None,
        "limit": plan.limit,
        "changes": [vars(change) for change in plan.changes],
    }


def _option_object(option: Option) -> dict[str, Any]:
    finite = {name: None if math.isinf(value) else value for name, value in option.costs.as_dict().items()}
    return {
        "backend": option.name,
        "step_s": option.time.total,
        "parts_s": option.time.parts,
        "communication_s": dict(option.time.communicated),
        "hidden_s": dict(option.time.hidden),
        "flops": option.traced.work.flops,
        "memory_bytes": option.memory.total,
        "memory_parts_bytes": dict(option.memory.parts),
        "memory_peak_in": option.memory.at,
        "largest_micro_size": option.micro_size,
        **finite,
    }


def _seconds(value: float) -> str:
    if value >= 120:
        return f"{value / 60:,.1f} min"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def _bytes(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / _MIB:.0f} MiB"
