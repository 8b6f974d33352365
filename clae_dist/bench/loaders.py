"""Whole loaders, with processes or threads: time per image, busy cores and memory.

A loader is timed from the moment when each of its workers begins a batch.
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
from clae_dist.bench.measure import Row, Say, Times, make_rows
from clae_dist.data.loader import TrainingViews, forkserver, load, make_order, start_loader_process
from clae_dist.world import World

Make = Callable[[Chunk, DataBench, int], Iterator[Any]]


def measure_loaders(chunk: Chunk, settings: DataBench, say: Say) -> list[Row]:
    """Seconds per image on all cores, in turns: ours with processes and with threads, and the usual pipeline."""
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
    times = {name: Times([one.wall_s for one in each], [one.cpu_s for one in each]) for name, each in seen.items()}
    figures = {name: {"more": _figures(times[name], each)} for name, each in seen.items()}
    notes = {name: note for name, (note, _, _) in loaders.items()}
    return make_rows("an image: the whole loader, all cores", notes, times, figures)


@dataclass(frozen=True)
class _Seen:
    """Seconds and CPU seconds per image while all workers are busy, and bytes of memory that only one worker uses."""

    wall_s: float
    cpu_s: float
    own_bytes: int  # the largest of all workers, batches included; 0 without workers


def _figures(times: Times, seen: list[_Seen]) -> dict[str, float]:
    figures = {"images_per_s": 1 / times.median_s, "busy_cores": statistics.median(one.cpu_s / one.wall_s for one in seen)}
    own = max(one.own_bytes for one in seen)
    return figures | ({"own_bytes_a_worker": own} if own else {})


def _watch(batches: Iterator[Any], workers: int, chunk: Chunk, settings: DataBench) -> _Seen:
    process = psutil.Process()
    for _ in islice(batches, max(1, workers)):  # afterwards every worker is at the start of a batch
        pass
    start, start_cpu = time.perf_counter(), _cpu_s(process)
    count = settings.batches * max(1, workers)
    for _ in islice(batches, count):
        pass
    wall, cpu = time.perf_counter() - start, _cpu_s(process) - start_cpu
    images = count * len(chunk.jpegs)
    # The workers are children of the fork server, which is a child of this process.
    own = [child.memory_full_info().uss for child in process.children(recursive=True) if child.parent() not in (None, process)]
    return _Seen(wall / images, cpu / images, max(own, default=0) if not isinstance(batches, Generator) else 0)


def _cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process and its descendants."""
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _ours(chunk: Chunk, settings: DataBench, workers: int) -> Iterator[Any]:
    config = replace(chunk.config, data=replace(chunk.config.data, workers=workers))
    return load(chunk.manifest, config, World.single("cpu"), 0, _steps(settings, workers))


def _steps(settings: DataBench, workers: int) -> int:
    """The number of steps: more than are timed, as workers that have finished exit."""
    return (2 + settings.batches) * max(1, workers)


def _threads(chunk: Chunk, settings: DataBench, count: int) -> Iterator[Any]:
    data = TrainingViews(chunk.reader, make_order(chunk.config, chunk.reader), chunk.config, 0, 1)
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
