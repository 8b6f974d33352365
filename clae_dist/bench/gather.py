"""`clae bench gather`: bytes and time of the loss between real processes, compared with open_clip and lightly.

# B images on each of W ranks, N = W·B, D embedding width.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from clae_dist import collectives
from clae_dist.bench import peers
from clae_dist.bench.contrast import TOLERANCE, along_sphere, forward_backward
from clae_dist.bench.measure import Row, Say, Times, UnequalError, assert_equal, cpu_figure, make_rows, time_in_turns
from clae_dist.bench.outcome import Outcome
from clae_dist.bench.peers import Loss
from clae_dist.bench.unit import UNITS, costs_of, unit_calls
from clae_dist.config import Objective
from clae_dist.contrast.distributed import Contrast
from clae_dist.devices import Request, local_device
from clae_dist.errors import OK, UNEXPECTED, ClaeError
from clae_dist.launchers.local import spawn
from clae_dist.launchers.rank import Ending
from clae_dist.objectives import names
from clae_dist.wire import CountTraffic, Network, fit
from clae_dist.world import World, connect


@dataclass(frozen=True)
class GatherBench:
    world_sizes: Sequence[int] = (2, 4)
    images: int = 256  # a rank
    dim: int = 128
    temperature: float = 0.5
    repeats: int = 9
    message_bytes: Sequence[int] = tuple(1 << power for power in range(12, 25, 2))  # whole buffers
    with_peers: bool = True


KINDS = {"nt_xent": "NT-Xent", "instance": "instance discrimination across views, both directions"}

FULL = GatherBench()
QUICK = GatherBench(world_sizes=(2,), repeats=5, message_bytes=tuple(1 << power for power in range(12, 21, 4)))


class RanksError(ClaeError, RuntimeError):
    """The ranks failed before they had measured."""


def bench(settings: GatherBench, say: Say) -> Outcome | None:
    """Measure on ranks of this machine, or on the ranks of torchrun: then every rank calls it, and all but rank 0 get None."""
    notes = peers.missing() if settings.with_peers else []
    for note in notes:
        say(note)
    if dist.is_torchelastic_launched():
        with connect() as world:
            rows = measure(world, settings, say if world.is_main else _silent)
            return Outcome(rows, world.device, notes) if world.is_main else None
    rows = []
    device: Request = "auto" if torch.cuda.device_count() >= max(settings.world_sizes) else "cpu"
    for size in settings.world_sizes:
        say(f"gather: {size} ranks on this machine")
        ending = spawn(size, _on_a_rank, settings, device)
        if ending.code:
            raise RanksError(ending.message)
        rows += [Row(**row) for row in json.loads(ending.message)]
    return Outcome(rows, local_device(device), notes)


def _silent(text: str) -> None:
    """Print nothing, on ranks other than 0."""


def _on_a_rank(settings: GatherBench, device: Request) -> Ending:
    with connect(device=device) as world:
        torch.set_num_threads(1)
        try:
            rows = measure(world, settings, _silent)
        except UnequalError as error:
            return Ending(UNEXPECTED, str(error))
        return Ending(OK, json.dumps([dataclasses.asdict(row) for row in rows]))


def measure(world: World, settings: GatherBench, say: Say) -> list[Row]:
    """The rows of the network, then of every objective; equal on every rank. Collective."""
    say("gather: the network")
    networks, rows = measure_network(world, settings)
    rows += measure_unit(world, settings)
    for objective in sorted(names(), key=("nt_xent", "instance").__contains__, reverse=True):  # with peers first
        say(f"gather: {objective}")
        rows += measure_loss(objective, world, settings, networks)
    return rows


# ---- the losses ----


def measure_loss(objective: str, world: World, settings: GatherBench, networks: dict[str, Network]) -> list[Row]:
    """Forward and backward of each contender: gradients are compared, then bytes counted, then time measured."""
    kind = KINDS.get(objective, objective)
    case = f"{kind}: {world.size} ranks ({world.collectives}), {settings.images} images each, D {settings.dim}"
    a, b = _views(world, settings)
    calls: dict[str, Callable[[], Any]] = {}
    notes, traffic, figures = {}, {}, {}
    expected: list[torch.Tensor] = []
    with peers.quietly():
        for name, note, loss in contenders(objective, world, settings):
            calls[name], notes[name] = forward_backward(loss, a, b), note
            with CountTraffic(world.size) as count:
                result = along_sphere(calls[name](), a, b)
            assert_equal(case, name, result, expected or result, TOLERANCE)
            expected, traffic[name] = expected or result, count.traffic
        times = time_together(world, calls, settings.repeats)
    for name in calls:
        sent = round(world.mean(torch.tensor(traffic[name].wire_bytes, dtype=torch.float64, device=world.device)).item())
        used = {kind: traffic[name].names.count(kind) for kind in dict.fromkeys(traffic[name].names)}
        notes[name] += f": {', '.join(f'{count} x {kind}' for kind, count in used.items())}"
        floor_s = sum(_alone(kind, num_bytes, networks, world.size) for kind, num_bytes in traffic[name].sent)
        more = {"collectives": float(len(traffic[name].sent))} | cpu_figure(times[name], world.device)
        figures[name] = {"floor_s": floor_s, "wire_bytes": sent, "more": more}
    return make_rows(case, notes, times, figures)


def _alone(kind: str, num_bytes: float, networks: dict[str, Network], num_ranks: int) -> float:
    """Seconds of a collective, by the measured collective that is most similar."""
    like = networks[{"allgather": "all_gather", "allreduce": "all_reduce"}.get(kind[:9], "reduce_scatter")]
    if kind in ("scatter", "gather"):  # one per rank move the bytes of a reduce-scatter, and may overlap
        return like.alpha_s / num_ranks + like.beta_s_per_byte * num_bytes
    return like.seconds(num_bytes)


def contenders(objective: str, world: World, settings: GatherBench) -> Iterator[tuple[str, str, Loss]]:
    temperature = settings.temperature
    for way in ("log_sum_exp", "reduce_scatter"):
        yield way, "ours", _ours(Contrast(Objective(objective, temperature, gather=way), world), both=objective == "instance")
    if objective == "nt_xent" and settings.with_peers and peers.is_installed("lightly"):
        yield "lightly", "NTXentLoss(gather_distributed=True)", peers.lightly_nt_xent(temperature)
    if objective == "instance" and settings.with_peers and peers.is_installed("open_clip"):
        loss = peers.open_clip_loss(temperature, world.rank, world.size)
        yield "open_clip", "ClipLoss(local_loss, gather_with_grad)", loss


def _ours(contrast: Contrast, *, both: bool) -> Loss:
    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        rows_a, rows_b = contrast.rows(a), contrast.rows(b)
        return (contrast(rows_a, rows_b) + contrast(rows_b, rows_a)) / 2 if both else contrast(rows_a, rows_b)

    return loss


def _views(world: World, settings: GatherBench) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of random rows, different ones on every rank."""
    generator = torch.Generator().manual_seed(world.rank)
    a, b = F.normalize(torch.randn(2, settings.images, settings.dim, generator=generator), dim=2).to(world.device).unbind()
    return a.clone().requires_grad_(), b.clone().requires_grad_()


# ---- the network ----


def measure_network(world: World, settings: GatherBench) -> tuple[dict[str, Network], list[Row]]:
    """Fit α and β of each collective to messages of growing size by least squares."""
    networks, rows = {}, []
    for name, collective in collective_calls().items():
        share = 2 if name == "all_reduce" else 1
        calls = {str(size): collective(world, size) for size in settings.message_bytes}
        times = time_together(world, calls, settings.repeats)
        sent = [share * size * (world.size - 1) / world.size for size in settings.message_bytes]
        networks[name] = network = fit(sent, [times[str(size)].median_s for size in settings.message_bytes])
        largest = times[str(settings.message_bytes[-1])]
        more = {"alpha_s": network.alpha_s, "beta_s_per_byte": network.beta_s_per_byte, "fit_error": network.worst}
        sizes = f"{settings.message_bytes[0]:,} to {settings.message_bytes[-1]:,} bytes"
        note = f"{sizes}; time and bytes of the largest; alpha_s + beta_s_per_byte x bytes on the wire"
        case = f"the network: {world.size} ranks ({world.collectives})"
        figures = {"floor_s": network.seconds(sent[-1]), "wire_bytes": round(sent[-1]), "more": more}
        rows += make_rows(case, {name: note}, {name: largest}, {name: figures})
    return networks, rows


def measure_unit(world: World, settings: GatherBench) -> list[Row]:
    """Costs of FSDP2's units beside their messages."""
    name = "fsdp2"
    times = time_together(world, unit_calls(world), settings.repeats)
    case = f"units without parameters to speak of: {world.size} ranks ({world.collectives})"
    note = (
        "eight gathered twice and reduced. CPU seconds: unit_s of one of these, parameter_s of each parameter in it, "
        "update_s of one that AdamW updates"
    )
    return make_rows(case, {name: note}, {name: times[UNITS]}, {name: {"more": asdict(costs_of(times))}})


def collective_calls() -> dict[str, Callable[[World, int], Callable[[], Any]]]:
    """By name, a function of the world and the bytes of the buffer that makes a call of the collective."""
    return {"all_gather": _all_gather, "reduce_scatter": _reduce_scatter, "all_reduce": _all_reduce}


def _parts(world: World, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of float32 of all ranks, and this rank's part of it."""
    everyone = torch.zeros(num_bytes // 4 // world.size * world.size, device=world.device)
    return everyone, everyone.chunk(world.size)[world.rank].clone()


def _all_gather(world: World, num_bytes: int) -> Callable[[], Any]:
    everyone, mine = _parts(world, num_bytes)
    return lambda: collectives.all_gather(everyone, mine, world.group)


def _reduce_scatter(world: World, num_bytes: int) -> Callable[[], Any]:
    everyone, mine = _parts(world, num_bytes)
    return lambda: collectives.reduce_scatter(mine, everyone, world.group)


def _all_reduce(world: World, num_bytes: int) -> Callable[[], Any]:
    everyone = torch.zeros(num_bytes // 4, device=world.device)
    return lambda: dist.all_reduce(everyone, group=world.group)


def time_together(world: World, calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Time the calls after a barrier each; a repeat takes as long as on its slowest rank, for which the others wait."""

    def barrier() -> None:
        world.flags_anywhere(False)

    times = time_in_turns(calls, world.device, repeats, ready=barrier, at_least_s=0.0)
    everyone = world.gather_objects({name: one.wall for name, one in times.items()})
    slowest = {name: [max(repeat) for repeat in zip(*(rank[name] for rank in everyone), strict=True)] for name in times}
    assert all(statistics.median(wall) > 0 for wall in slowest.values())
    return {name: Times(wall, times[name].cpu) for name, wall in slowest.items()}
