"""Whole loaders: processes or threads, and how busy they keep the cores.

# All of a loader's workers are timed from the moment each of them begins a batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any

import psutil  # type: ignore[import-untyped]
from torch.utils.data import DataLoader

from clae_dist.bench import data_peers as peers
from clae_dist.bench.chunk import Chunk, Settings
from clae_dist.bench.measure import Row, Say, with_ratios
from clae_dist.data.loader import TwoViews, forkserver, load, make_order
from clae_dist.world import World


def measure_loaders(chunk: Chunk, settings: Settings, say: Say) -> list[Row]:
    """Ours with each number of processes, ours with threads, and the usual pipeline: seconds an image, all cores."""
    rows = []
    for count in settings.workers:
        say(f"loader with {count} processes")
        batches = _ours(chunk, settings, count)
        rows.append(_loader_row(f"ours_{count}", f"{count} loader processes", batches, count, chunk, settings))
    most = max(settings.workers)
    for name, note, make in (
        (f"threads_{most}", f"ours, {most} threads of one process", _threads),
        (f"pil_{most}", f"{most} processes, Pillow's SimCLR pipeline, all of the augmentation", _usual),
    ):
        say(f"loader: {note}")
        rows.append(_loader_row(name, note, make(chunk, settings, most), most, chunk, settings))
    return with_ratios(rows)


def _loader_row(name: str, note: str, batches: Iterator[Any], workers: int, chunk: Chunk, settings: Settings) -> Row:
    """Seconds an image once all workers work; cores that were busy; what a worker holds for itself, its batches included."""
    process = psutil.Process()
    for _ in islice(batches, max(1, workers)):  # from here on every worker is at the start of a batch
        pass
    start, start_cpu = time.perf_counter(), _cpu_s(process)
    count = settings.batches * max(1, workers)
    for _ in islice(batches, count):
        pass
    wall, cpu = time.perf_counter() - start, _cpu_s(process) - start_cpu
    images = count * len(chunk.jpegs)
    more = {"images_per_s": images / wall, "busy_cores": cpu / wall}
    own = [child.memory_full_info().uss for child in process.children(recursive=True) if _holds_batches(child)]
    if own:
        more["own_bytes_a_worker"] = max(own)
    return Row("an image: the whole loader, all cores", f"{name}: {note}", wall / images, 0.0, {}, more=more)


def _holds_batches(child: psutil.Process) -> bool:
    """A child of the fork server, which is one of ours, as the tracker of shared memory is."""
    return child.parent() not in (None, psutil.Process())


def _cpu_s(process: psutil.Process) -> float:
    """Of this process and those below it."""
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _ours(chunk: Chunk, settings: Settings, workers: int) -> Iterator[Any]:
    config = replace(chunk.config, data=replace(chunk.config.data, workers=workers))
    return load(chunk.manifest, config, World.single("cpu"), 0, _steps(settings, workers))


def _steps(settings: Settings, workers: int) -> int:
    """More than are timed: workers that are done with all would be gone."""
    return (2 + settings.batches) * max(1, workers)


def _threads(chunk: Chunk, settings: Settings, count: int) -> Iterator[Any]:
    data = TwoViews(chunk.reader, make_order(chunk.config, chunk.reader), chunk.config, 0, 1)
    with ThreadPoolExecutor(max(1, count)) as pool:
        yield from pool.map(data.__getitem__, range(_steps(settings, count)))


def _usual(chunk: Chunk, settings: Settings, workers: int) -> Iterator[Any]:
    jpegs = chunk.jpegs * _steps(settings, workers)
    return iter(
        DataLoader(
            peers.PilPairs(jpegs, settings.image_size),
            batch_size=len(chunk.jpegs),
            num_workers=workers,
            multiprocessing_context=forkserver() if workers else None,
        )
    )
