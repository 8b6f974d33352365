"""`clae bench plan`: steps and memory as `clae plan` predicts them, beside those of real ranks on this machine.

In every process, steps of other sizes without communication and collectives of a few sizes are timed in turns with the step
that is predicted from them, so that all see the same load of the machine. Ranks of one case run at the same time.

# W ranks, B rows of a rank.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from clae_dist.bench.gather import collective_calls, time_together
from clae_dist.bench.measure import Row, Say
from clae_dist.bench.outcome import Outcome
from clae_dist.bench.real_step import peak_bytes, step_of
from clae_dist.bench.unit import costs_of, unit_calls
from clae_dist.config import Batch, Config, Data, MethodSettings, Model, Optim, Parallel, Train
from clae_dist.cores import threads_per_rank
from clae_dist.errors import OK, ClaeError
from clae_dist.launchers.local import spawn
from clae_dist.launchers.rank import Ending
from clae_dist.methods.clae import Clae
from clae_dist.methods.simclr import SimClr
from clae_dist.planner.memory import memory_of
from clae_dist.planner.network import Links
from clae_dist.planner.table import Chip, Fsdp2Costs
from clae_dist.planner.timing import Rates, Sample, StepTime, fit_rates, step_time
from clae_dist.planner.trace import Traced, trace
from clae_dist.wire import Network, fit
from clae_dist.world import World, connect

_MESSAGES = (4 << 10, 256 << 10, 4 << 20)  # bytes of the buffers on which the network is fitted
_SHARES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
_CALIBRATION: tuple[tuple[MethodSettings, int], ...] = tuple(
    (settings, rows) for settings in (SimClr.Settings(), Clae.Settings()) for rows in (8, 24)
)
_MEDIAN_BOUND, _WORST_BOUND, _MEMORY_BOUND = 0.15, 0.30, 0.15


@dataclass(frozen=True)
class PlanBench:
    encoders: Sequence[str] = ("small_resnet", "timm/resnet10t", "timm/vit_tiny_patch16_224")
    ranks: Sequence[int] = (1, 2, 4)
    rows: int = 16  # of a rank
    image_size: int = 64
    repeats: int = 5


FULL = PlanBench()
QUICK = PlanBench(("small_resnet",), (1, 2), image_size=32, repeats=3)


Found = Mapping[str, Any]  # of a case: seconds of each call by name, their spread, and memory


@dataclass(frozen=True)
class Case:
    """A configuration that is predicted and measured."""

    encoder: str
    ranks: int
    backend: str
    micro: int

    def title(self, settings: PlanBench) -> str:
        micro = f", {self.micro} at a time" if self.micro else ""
        return f"{self.encoder}, {self.ranks} x {settings.rows} rows{micro}, {self.backend}"


class CaseError(ClaeError, RuntimeError):
    """The ranks of a case failed."""


def bench(settings: PlanBench, say: Say) -> Outcome | None:
    """A row for each case: median_s is measured, `more` has the prediction and the errors, relative to what was measured.

    Under torchrun, cases of its ranks; None on ranks other than the first.
    """
    rows = []
    for case, found in _measured_by_torchrun(settings) if dist.is_torchelastic_launched() else _measured_here(settings):
        rows.append(_row(case, found, settings))
        more = rows[-1].more
        say(f"plan: {rows[-1].case}: time {more['time_error']:+.0%}, memory {more['memory_error']:+.0%}")
    return Outcome(rows, torch.device("cpu"), [verdict(rows)]) if rows else None


def cases(settings: PlanBench, world_sizes: Sequence[int]) -> Iterator[Case]:
    for encoder in settings.encoders:
        for ranks in world_sizes:
            yield Case(encoder, ranks, "ddp", 0)
            yield Case(encoder, ranks, "ddp", settings.rows // 2)
            if ranks > 1:
                yield Case(encoder, ranks, "fsdp2", 0)


def _measured_here(settings: PlanBench) -> Iterator[tuple[Case, Found]]:
    """Start the ranks of a case together, on this machine, case by case."""
    for case in cases(settings, settings.ranks):
        ending = spawn(case.ranks, _on_a_rank, case, settings)
        if ending.code:
            raise CaseError(f"{case.title(settings)}: {ending.message}")
        yield case, json.loads(ending.message)


def _measured_by_torchrun(settings: PlanBench) -> list[tuple[Case, Found]]:
    """Measure on the ranks of torchrun, with a thread each; nothing is returned on ranks other than the first."""
    torch.set_num_threads(1)
    with connect(device="cpu") as world:
        compared = list(cases(settings, (world.size,)))
        peaks = [_measure_memory(case, settings, world) for case in compared]
        times = [_measure_times(case, settings, world) for case in compared]
    found = [{**one, "memory": peak} for one, peak in zip(times, peaks, strict=True)]
    return list(zip(compared, found, strict=True)) if world.is_main else []


def verdict(rows: Sequence[Row]) -> str:
    """The errors of all cases beside their bounds, in a line."""
    times = [abs(row.more["time_error"]) for row in rows]
    sizes = [abs(row.more["memory_error"]) for row in rows]
    bounds = ((statistics.median(times), _MEDIAN_BOUND), (max(times), _WORST_BOUND), (max(sizes), _MEMORY_BOUND))
    median, worst, memory = (
        f"{value:.0%} (bound {bound:.0%}: {'met' if value <= bound else 'missed'})" for value, bound in bounds
    )
    return f"{len(rows)} cases: error of time, median {median}, worst {worst}; of memory, worst {memory}"


def _row(case: Case, found: Found, settings: PlanBench) -> Row:
    config = _config(case.encoder, settings, case=case)
    traced = trace(config, case.ranks, gpu=False, norm_ranks=case.ranks)
    predicted = _step_time(traced, config, found, settings)
    memory = memory_of(traced, config).total
    more = {"predicted_s": predicted.total, "time_error": predicted.total / found["step"] - 1}
    more |= {"predicted_bytes": memory, "memory_error": memory / found["memory"] - 1}
    more |= {f"predicted_{name}_s": seconds for name, seconds in predicted.exposed.items()}
    more |= {"communication_s": found["step"] - found["alone"]} if case.ranks > 1 else {}
    what = "measured: a step of CLAE exact; predicted from steps of other sizes and methods"
    return Row(case.title(settings), what, found["step"], found["spread"], added_bytes=found["memory"], more=more)


def _step_time(traced: Traced, config: Config, found: Found, settings: PlanBench) -> StepTime:
    """The prediction from the times of other steps and of collectives that the ranks found."""
    ranks = traced.ranks
    networks = {(name, ranks): _fitted(name, times, ranks) for name, times in found["network"].items()}
    chip = Chip("cpu", "", 0.0, 0.0, 0.0, "memory", ranks, 0.0, "this machine")
    works = _calibration_works(config.model.encoder, settings)
    samples = [replace(one, seconds=seconds) for one, seconds in zip(works, found["calibration"], strict=True)]
    rates: Rates = replace(fit_rates(samples, "calibration"), fsdp2=Fsdp2Costs(**found["fsdp2"]))
    return step_time(traced, config, rates, Links(chip, ranks, None, networks))


@cache
def _calibration_works(encoder: str, settings: PlanBench) -> tuple[Sample, ...]:
    """The work of the steps without communication, whose seconds are still to be measured."""
    found = []
    for method, rows in _CALIBRATION:
        traced = trace(_config(encoder, settings, method, rows), 1, gpu=False, norm_ranks=1)
        found.append(Sample.of(traced.work.bins, 0.0))
    return tuple(found)


def _fitted(name: str, seconds: Sequence[float], ranks: int) -> Network:
    return fit([_SHARES[name] * size * (ranks - 1) / ranks for size in _MESSAGES], seconds)


def _config(
    encoder: str, settings: PlanBench, method: MethodSettings | None = None, rows: int = 0, *, case: Case | None = None
) -> Config:
    """The configuration of a case; without one, that of a rank alone."""
    ranks, micro, backend = (case.ranks, case.micro, case.backend) if case else (1, 0, "ddp")
    return Config(
        data=Data(image_size=settings.image_size),
        model=Model(encoder=encoder, norm="local"),
        method=method or Clae.Settings(),
        batch=Batch(global_size=(rows or settings.rows) * ranks, micro_size=micro),
        optim=Optim(name="adamw"),
        train=Train(precision="float32"),
        parallel=Parallel(backend=backend),  # type: ignore[arg-type]
    )


# ---- on a rank ----


def _on_a_rank(case: Case, settings: PlanBench) -> Ending:
    with connect(device="cpu") as world:
        torch.set_num_threads(threads_per_rank(case.ranks))
        memory = _measure_memory(case, settings, world)
        return Ending(OK, json.dumps({**_measure_times(case, settings, world), "memory": memory}))


def _measure_memory(case: Case, settings: PlanBench, world: World) -> int:
    """Peak bytes of the rank with the most."""
    config = _config(case.encoder, settings, case=case)
    return max(world.gather_objects(peak_bytes(lambda: step_of(config, world), world.device)))


def _measure_times(case: Case, settings: PlanBench, world: World) -> Found:
    """Median seconds of the case's step, of that of a rank alone, of the calibration's steps, of collectives by size."""
    calls: dict[str, Callable[[], Any]] = {"step": step_of(_config(case.encoder, settings, case=case), world)}
    alone = World.single("cpu")
    calls["alone"] = step_of(_config(case.encoder, settings, case=replace(case, ranks=1, backend="ddp")), alone)
    for number, (method, rows) in enumerate(_CALIBRATION):
        calls[f"calibration {number}"] = step_of(_config(case.encoder, settings, method, rows), alone)
    if world.group is not None:
        for name, collective in collective_calls().items():
            calls |= {f"{name} {size}": collective(world, size) for size in _MESSAGES}
        calls |= unit_calls(world)
    times = time_together(world, calls, settings.repeats)
    network = {name: [times[f"{name} {size}"].median_s for size in _MESSAGES] for name in _SHARES} if world.group else {}
    return {
        "step": times["step"].median_s,
        "spread": times["step"].spread,
        "alone": times["alone"].median_s,
        "calibration": [times[f"calibration {number}"].median_s for number in range(len(_CALIBRATION))],
        "network": network,
        "fsdp2": asdict(costs_of(times)) if world.group else {},
    }
