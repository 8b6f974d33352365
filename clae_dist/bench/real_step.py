"""Steps of a recipe on random images in memory, without data or a run folder: for comparing a plan with the machine.

# W ranks, B rows of a rank.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from clae_dist.bench.measure import no_freed_memory_held, peak_above, resident_bytes, time_in_turns
from clae_dist.bench.stand_in import stand_in_ranks
from clae_dist.bench.steps import Images
from clae_dist.config import Config
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.step import pretrain_step
from clae_dist.data.loader import num_views_of
from clae_dist.models import build_model
from clae_dist.parallel import make_backend
from clae_dist.planner.measured import RealStep
from clae_dist.planner.memory import memory_of
from clae_dist.planner.timing import Sample
from clae_dist.planner.trace import trace
from clae_dist.training.clock import Clock
from clae_dist.training.pretraining import make_pretraining
from clae_dist.world import World

_REPEATS = 5


def step_of(config: Config, world: World) -> Callable[[], Any]:
    """Build the recipe's model, backend and method; a call is one training step on the same images. Collective."""
    backend = make_backend(config, build_model(config, world.group).to(world.device), world)
    run = make_pretraining(config, world, backend, Clock(world.device))
    rows = config.rows_per_rank(world.size)
    ids = torch.arange(rows, device=world.device)
    batch = Images(_views(config, rows, world.device), ids, ids % 2)
    run = replace(run, augment=lambda batch: batch.views, noise=lambda batch, number: torch.rand_like(batch.views[number]))
    moment = Moment(0, 1, config.train.epochs)
    return lambda: pretrain_step(run, batch, moment)


def _views(config: Config, rows: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    sides = [config.data.image_size] * num_views_of(config) + [config.local_size] * config.views.local_crops
    dtype = torch.float64 if config.train.precision == "float64" else torch.float32
    return tuple(torch.rand(rows, 3, side, side, dtype=dtype, device=device) for side in sides)


def peak_bytes(make: Callable[[], Callable[[], Any]], device: torch.device) -> int:
    """Peak bytes of the second call of what `make` builds, with all that it keeps. Linux, or CUDA.

    Call it before other steps of this process: see no_freed_memory_held.
    """
    if device.type == "cuda":
        make()()  # libraries take their memory
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        run = make()
        run()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with no_freed_memory_held():
        make()()
        before = resident_bytes()
        run = make()
        run()
        return peak_above(run, before)


def measure_as_one_of(config: Config, ranks: int, norm_ranks: int, device: torch.device) -> tuple[RealStep, Sample]:
    """Measure steps of one real rank with the shapes of `ranks`: gathered rows are its own, and no message takes time.

    Return the step, and its work with its seconds. This process must have no process group.

    Args:
        config: under DDP or FSDP2.
        norm_ranks: ranks that share batch statistics with this one.
    """
    with stand_in_ranks(ranks, device) if ranks > 1 else nullcontext(World.single(device)) as world:
        peak = peak_bytes(lambda: step_of(config, world), device)
        times = time_in_turns({"step": step_of(config, world)}, device, _REPEATS, at_least_s=0)["step"]
    traced = trace(config, ranks, gpu=device.type == "cuda", norm_ranks=norm_ranks)
    step = RealStep(ranks, times.median_s, times.spread, peak, memory_of(traced, config).total)
    return step, Sample.of(traced.work.bins, times.median_s)
