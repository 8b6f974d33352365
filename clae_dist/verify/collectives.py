"""The collectives of a training run by type and size: values on all ranks, time and rate.

# W ranks, n elements of a rank's tensor.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from clae_dist import collectives
from clae_dist.bench.outcome import amount
from clae_dist.verify.check import SkippedError, Subject, Verdict
from clae_dist.world import World

QUICK = (4 << 10, 1 << 20, 16 << 20)  # bytes of the largest tensor of a call
FULL = (1 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20)
_REPEATS, _SECONDS = 5, 0.2


@dataclass(frozen=True)
class _Call:
    """One collective: the call, its result and the expected result, and the share of its bytes that crosses a link."""

    run: Callable[[], Any]
    result: torch.Tensor
    expected: torch.Tensor
    link_share: float


def check(subject: Subject, world: World) -> Verdict:
    """All-gather, all-reduce, reduce-scatter and broadcast. Collective."""
    if world.group is None:
        raise SkippedError("one rank; nothing is communicated")
    problems: list[str] = []
    rows: list[dict[str, Any]] = []
    for num_bytes in QUICK if subject.quick else FULL:
        for name, call in _calls(num_bytes, world):
            wrong = _wrong_ranks(call, world)
            if wrong:
                problems.append(f"{name} of {amount(num_bytes)}: wrong values on rank {', '.join(map(str, wrong))}")
            seconds = _seconds(call, world)
            figures = {"seconds": seconds, "bus_bytes_per_s": num_bytes * call.link_share / seconds, "right": not wrong}
            rows.append({"collective": name, "bytes": num_bytes, **figures})
    rates = [f"{row['collective']} {amount(row['bus_bytes_per_s'])}/s" for row in rows if row["bytes"] == rows[-1]["bytes"]]
    small = max(row["seconds"] for row in rows if row["bytes"] == rows[0]["bytes"])
    figure = f"{world.collectives}, {amount(rows[-1]['bytes'])}: {', '.join(rates)}"
    figure += f"; {amount(rows[0]['bytes'])} in at most {small * 1e6:.0f} µs"
    return Verdict.of(problems, figure, rows=rows, ranks=world.gather_objects(_place(world)))


def _place(world: World) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    return {"rank": world.rank, "host": platform.node(), "device": str(world.device), "gpu": gpu}


def _calls(num_bytes: int, world: World) -> Iterator[tuple[str, _Call]]:
    """Calls whose largest tensor has about `num_bytes`; its values are integers, so that every sum is exact in float32."""
    size, group, last = world.size, world.group, world.size - 1
    part = max(1, num_bytes // 4 // size)  # elements
    index = torch.arange(part * size, device=world.device)
    base = (index % 7 + 1).float()  # sums over 2,000,000 ranks are exact
    everyone, own = base.clone(), base[:part] * (world.rank + 1)
    factors = torch.arange(1, size + 1, device=world.device).float().repeat_interleave(part)
    gathered = torch.empty_like(base)
    yield (
        "all-gather",
        _Call(lambda: collectives.all_gather(gathered, own, group), gathered, base[:part].repeat(size) * factors, 1 - 1 / size),
    )
    total = size * (size + 1) // 2
    reduced = torch.empty_like(base)

    def all_reduce() -> None:
        reduced.copy_(everyone * (world.rank + 1))
        dist.all_reduce(reduced, group=group)

    yield "all-reduce", _Call(all_reduce, reduced, base * total, 2 - 2 / size)
    mine, scattered = base * (world.rank + 1), torch.empty_like(own)
    expected = base.view(size, part)[world.rank] * total
    yield (
        "reduce-scatter",
        _Call(lambda: collectives.reduce_scatter(scattered, mine, group), scattered, expected, 1 - 1 / size),
    )
    sent = torch.empty_like(base)

    def broadcast() -> None:
        sent.copy_(base * (world.rank + 1))
        dist.broadcast(sent, group_src=last, group=group)

    yield "broadcast", _Call(broadcast, sent, base * size, 1.0)


def _wrong_ranks(call: _Call, world: World) -> list[int]:
    call.result.fill_(-1)
    call.run()
    right = torch.equal(call.result, call.expected)
    return [rank for rank, fine in enumerate(world.gather_objects(right)) if not fine]


def _seconds(call: _Call, world: World) -> float:
    """Median time of the slowest rank."""

    def one() -> float:
        world.flags_anywhere(False)  # all ranks begin together
        begin = time.perf_counter()
        call.run()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        return world.largest(time.perf_counter() - begin)

    first = one()
    repeats = max(_REPEATS, min(20, int(_SECONDS / max(first, 1e-6))))
    return statistics.median(one() for _ in range(repeats))
