"""Whole loaders: processes or threads, and how busy they keep the cores.

# All of a loader's workers are timed from the moment each of them begins a batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import psutil  # type: ignore[import-untyped]
from torch.utils.data import DataLoader

from clae_dist.bench import data_peers as peers
from clae_dist.bench.chunk import Chunk, DataBench
from clae_dist.bench.measure import Row, Say, Times, with_ratios
from clae_dist.data.loader import TwoViews, forkserver, load, make_order, start_loader_process
from clae_dist.world import World

Make = Callable[[Chunk, DataBench, int], Iterator[Any]]


def measure_loaders(chunk: Chunk, settings: DataBench, say: Say) -> list[Row]:
    """Ours with each number of processes, ours with threads, and the usual pipeline, in turns: seconds an image, all cores."""
    most = max(settings.workers)
    loaders: dict[str, tuple[str, Make, int]] = {
        f"ours_{count}": (f"{count} loader processes", _ours, count) for count in settings.workers
    }
    loaders[f"threads_{most}"] = (f"ours, {most} threads of one process", _threads, most)
    loaders[f"pil_{most}"] = (f"{most} processes, Pillow's SimCLR pipeline, all of the augmentation", _usual, most)
    seen: dict[str, list[_Seen]] = {name: [] for name in loaders}
    for turn in range(settings.rounds):
        for name, (note, make, workers) in loaders.items():
            say(f"loaders, round {turn + 1} of {settings.rounds}: {note}")
            seen[name].append(_watch(make(chunk, settings, workers), workers, chunk, settings))
    return with_ratios([_row(f"{name}: {loaders[name][0]}", found) for name, found in seen.items()])


@dataclass(frozen=True)
class _Seen:
    """Seconds an image once all workers work; cores that were busy; bytes that a worker holds for itself, batches included."""

    wall_s: float
    cpu_s: float
    own_bytes: int  # 0: no workers


def _row(what: str, found: list[_Seen]) -> Row:
    times = Times([one.wall_s for one in found], [one.cpu_s for one in found])
    more = {"images_per_s": 1 / times.median_s, "busy_cores": statistics.median(one.cpu_s / one.wall_s for one in found)}
    own = max(one.own_bytes for one in found)
    if own:
        more["own_bytes_a_worker"] = own
    return Row("an image: the whole loader, all cores", what, times.median_s, times.spread, {}, more=more)


def _watch(batches: Iterator[Any], workers: int, chunk: Chunk, settings: DataBench) -> _Seen:
    process = psutil.Process()
    for _ in islice(batches, max(1, workers)):  # from here on every worker is at the start of a batch
        pass
    start, start_cpu = time.perf_counter(), _cpu_s(process)
    count = settings.batches * max(1, workers)
    for _ in islice(batches, count):
        pass
    wall, cpu = time.perf_counter() - start, _cpu_s(process) - start_cpu
    images = count * len(chunk.jpegs)
    own = [child.memory_full_info().uss for child in process.children(recursive=True) if _holds_batches(child)]
    return _Seen(wall / images, cpu / images, max(own, default=0) if not isinstance(batches, Generator) else 0)


def _holds_batches(child: psutil.Process) -> bool:
    """A child of the fork server, which is one of ours, as the tracker of shared memory is."""
    return child.parent() not in (None, psutil.Process())


def _cpu_s(process: psutil.Process) -> float:
    """Of this process and those below it."""
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _ours(chunk: Chunk, settings: DataBench, workers: int) -> Iterator[Any]:
    config = replace(chunk.config, data=replace(chunk.config.data, workers=workers))
    return load(chunk.manifest, config, World.single("cpu"), 0, _steps(settings, workers))


def _steps(settings: DataBench, workers: int) -> int:
    """More than are timed: workers that are done with all would be gone."""
    return (2 + settings.batches) * max(1, workers)


def _threads(chunk: Chunk, settings: DataBench, count: int) -> Iterator[Any]:
    data = TwoViews(chunk.reader, make_order(chunk.config, chunk.reader), chunk.config, 0, 1)
    with ThreadPoolExecutor(max(1, count)) as pool:
        yield from pool.map(data.__getitem__, range(_steps(settings, count)))


def _usual(chunk: Chunk, settings: DataBench, workers: int) -> Iterator[Any]:
    jpegs = chunk.jpegs * _steps(settings, workers)
    return iter(
        DataLoader(
            peers.PilPairs(jpegs, settings.image_size),
            batch_size=len(chunk.jpegs),
            num_workers=workers,
            worker_init_fn=start_loader_process,
            multiprocessing_context=forkserver() if workers else None,
        )
    )
