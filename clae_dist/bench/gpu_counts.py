"""`clae bench gpu-counts`: kernels, collectives and host waits of a training step on a GPU, counted without one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from clae_dist.bench import gpu_actions as actions
from clae_dist.bench.measure import Say
from clae_dist.bench.outcome import machine, versions
from clae_dist.devices import local_device
from clae_dist.errors import OK, ClaeError
from clae_dist.launchers.local import spawn
from clae_dist.launchers.rank import Ending
from clae_dist.objectives import names

RESNET_50 = actions.Shape()
SMALL = actions.Shape("small_resnet")
_IN_FULL = RESNET_50.encoder
_NORM_LIMIT = 106  # half of what torch's SyncBatchNorm takes for the 53 layers of a ResNet-50 in four forwards


@dataclass(frozen=True)
class CountRow:
    """One count. `limit` is the most that it should be, None where there is no limit."""

    name: str
    value: float
    unit: str
    limit: float | None
    how: str

    @property
    def within_limit(self) -> bool:
        return self.limit is None or self.value <= self.limit


@dataclass(frozen=True)
class GpuCounts:
    """The settings: what is counted."""

    shape: actions.Shape = RESNET_50
    fsdp2: actions.Shape = SMALL
    images: int = 128  # of a rank, that are augmented
    image_size: int = 224


FULL = GpuCounts()
QUICK = GpuCounts(shape=SMALL)


@dataclass(frozen=True)
class CountOutcome:
    """The rows with versions and machine, as a table or as JSON."""

    rows: list[CountRow]

    def as_json(self) -> str:
        rows = [{**dataclasses.asdict(row), "within_limit": row.within_limit} for row in self.rows]
        return json.dumps({"versions": versions(), "machine": machine(local_device()), "rows": rows}, indent=1)

    def as_table(self) -> str:
        return "\n".join(_table(self.rows))


class CountsError(ClaeError, RuntimeError):
    """The process that counts failed."""


def bench(settings: GpuCounts, say: Say) -> CountOutcome:
    """Raises CountsError."""
    return CountOutcome(_in_another_process(settings, say))


def rows(*, quick: bool = False) -> list[CountRow]:
    """The rows of `clae bench gpu-counts`, counted in a process of its own, so that one of a process group may call it.

    Raises CountsError.
    """
    return _in_another_process(QUICK if quick else FULL, lambda text: None)


def _in_another_process(settings: GpuCounts, say: Say) -> list[CountRow]:
    say("gpu-counts: by torch's dispatcher, on stand-ins")
    ending = spawn(1, _count_there, settings)
    if ending.code:
        raise CountsError(ending.message)
    found = [CountRow(**row) for row in json.loads(ending.message)]
    if torch.cuda.is_available():
        say("gpu-counts: by torch's profiler, on this GPU")
        from clae_dist.bench.gpu_launches import launches

        found += [CountRow(*row) for row in launches(settings.shape.encoder, settings.images, settings.image_size)]
    return found


def _count_there(settings: GpuCounts) -> Ending:
    torch.set_num_threads(1)
    return Ending(OK, json.dumps([dataclasses.asdict(row) for row in _rows(settings)]))


def _rows(settings: GpuCounts) -> Iterator[CountRow]:
    sections: list[Callable[[GpuCounts], Iterator[CountRow]]] = [_loop, _augmentation, _step, _compiled, _loss, _fsdp2, _saving]
    for section in sections:
        yield from section(settings)


def _loop(_: GpuCounts) -> Iterator[CountRow]:
    how = "a run of CLAE exact in one process; between the starts of two steps that log, evaluate and save nothing"
    yield CountRow("host waits of a step", actions.waits_of_a_step(), "waits", 1, how)


def _augmentation(settings: GpuCounts) -> Iterator[CountRow]:
    size = f"both views of {settings.images} images of {settings.image_size} px"
    ratio = "against reading uint8 once and writing float32 once"
    counts, times = actions.augmentation(settings.images, settings.image_size)
    yield CountRow("augmentation, eager: kernels", counts.kernels, "kernels", 40, f"{size}, on the meta device")
    yield CountRow("augmentation, eager: host waits", counts.waits, "waits", 0, size)
    yield CountRow("augmentation, eager: bytes", round(times, 2), "times", 6, f"{size}, {ratio}")
    if find_spec("triton") is None:
        return
    counts, times = actions.augmentation(settings.images, settings.image_size, fused=True)
    given = "the tensors given to each Triton kernel; pixels around a tile come from the cache"
    yield CountRow("augmentation, fused: kernels", counts.kernels, "kernels", 2, f"{size}; one a view")
    yield CountRow("augmentation, fused: bytes", round(times, 2), "times", 2, f"{size}, {ratio}; {given}")


def _step(settings: GpuCounts) -> Iterator[CountRow]:
    shape = settings.shape
    counts = actions.step(shape)
    how = (
        f"CLAE exact, {shape.encoder}, bfloat16, DDP, rank 0 of {shape.num_ranks}, without augmentation; "
        f"{shape.images} images of {shape.image_size} px, on which counts do not depend"
    )
    limit = _NORM_LIMIT if shape.encoder == _IN_FULL else None
    norms = counts.collectives_named("all", "global_batch_norm")
    yield CountRow("step: kernels", counts.kernels, "kernels", None, f"{how}; a foreach operation is one")
    yield CountRow("step: collectives", len(counts.collectives), "collectives", None, how)
    gathers = counts.collectives_named("allgather", "global_batch_norm")
    yield CountRow("step: all-gathers of batch statistics", gathers, "collectives", limit, how)
    yield CountRow("step: all-reduces of batch statistics", norms - gathers, "collectives", limit, how)


def _compiled(settings: GpuCounts) -> Iterator[CountRow]:
    how = f"the first block of {settings.shape.encoder} in training mode, statistics of all ranks; torch._dynamo.explain"
    yield CountRow("graph breaks of a compiled block", actions.graph_breaks(settings.shape), "breaks", 0, how)


def _loss(_: GpuCounts) -> Iterator[CountRow]:
    how = "128 images a rank, width 128, 512 ranks, forward and backward after the gather; on the meta device"
    for name in sorted(names(), key=lambda name: name != "nt_xent"):
        limit = 60 if name == "nt_xent" else None
        yield CountRow(f"loss {name}: kernels", actions.loss(name).kernels, "kernels", limit, how)


def _fsdp2(settings: GpuCounts) -> Iterator[CountRow]:
    shape = settings.fsdp2
    counts = actions.step(shape, "fsdp2")
    units = counts.collectives_named("reducescatter")
    how = f"CLAE exact, {shape.encoder}, bfloat16, {units} units with parameters, rank 0 of {shape.num_ranks}"
    yield CountRow("FSDP2: unit gathers of a step", counts.operations.count("all_gather_copy_in"), "all-gathers", 66, how)
    yield CountRow("FSDP2: reduce-scatters of a step", units, "reduce-scatters", None, how)


def _saving(settings: GpuCounts) -> Iterator[CountRow]:
    counts = actions.save(settings.shape)
    how = f"{settings.shape.encoder} with model.norm=local"
    yield CountRow("all-reduces before a save", counts.collectives_named("allreduce"), "all-reduces", 1, how)


def _table(rows: list[CountRow]) -> Iterator[str]:
    yield ", ".join(f"{name} {version}" for name, version in versions().items())
    yield ", ".join(f"{name} {value}" for name, value in machine(local_device()).items())
    yield ""
    yield f"  {'':<40}{'count':>9}{'at most':>9}"
    for row in rows:
        limit = "" if row.limit is None else f"{row.limit:g}"
        over = "" if row.within_limit else "  MORE"
        yield f"  {row.name:<40}{row.value:>9g}{limit:>9}{over}"
        yield f"    {row.how}"
