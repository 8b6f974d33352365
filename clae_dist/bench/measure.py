"""Measure contenders whose results were found equal: time in turns, then the memory of one call."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from clae_dist.errors import ClaeError

Say = Callable[[str], None]
_M_MMAP_THRESHOLD = -3  # of <malloc.h>


class UnequalError(ClaeError, RuntimeError):
    """A contender computes a different result, so its time cannot be compared."""


Runs = Mapping[str, tuple[str, Callable[[], Any]]]  # name → description, and one call


@dataclass(frozen=True)
class Row:
    """The figures of one contender. Every bench has the same fields; None where one does not apply."""

    case: str
    what: str  # "name: description", with the name that ratio_to has
    median_s: float
    spread: float  # interquartile range over median
    ratio_to: dict[str, float] = field(default_factory=dict)  # median_s over that of each other row of the case
    floor_s: float | None = None  # lower bound of any implementation on this machine, chosen by the bench
    added_bytes: int | None = None  # peak memory of one call above the level before it
    wire_bytes: int | None = None  # sent by a rank in one call
    bytes_ratio_to: dict[str, float] = field(default_factory=dict)  # as ratio_to, of wire_bytes or added_bytes
    more: dict[str, float] = field(default_factory=dict)  # further figures by name

    @property
    def name(self) -> str:
        return self.what.split(":")[0]


@dataclass(frozen=True)
class Times:
    """Seconds of each repeat: wall-clock time, and CPU time of all threads of this process."""

    wall: list[float]
    cpu: list[float] = field(default_factory=list)

    def per(self, count: int) -> Times:
        """The time of one of `count` equal parts of a repeat."""
        return Times([value / count for value in self.wall], [value / count for value in self.cpu])

    @property
    def median_s(self) -> float:
        return statistics.median(self.wall)

    @property
    def spread(self) -> float:
        if len(self.wall) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.wall, n=4, method="inclusive")
        return (high - low) / self.median_s


def assert_equal(
    case: str, name: str, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], relative: float
) -> float:
    """Return the largest difference, relative to the largest entry of its tensor. Raises UnequalError above `relative`."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape, f"{name}: {tuple(one.shape)} beside {tuple(other.shape)}"
        difference = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-300)
        worst = max(worst, float(difference)) if torch.isfinite(difference) else float("inf")
    if worst > relative:
        raise UnequalError(
            f"{case}: {name} differs from the reference by {worst:.1e} of the largest entry, more than {relative:.0e}; it "
            "computes something else, so its time cannot be compared."
        )
    return worst


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turns(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    *,
    ready: Callable[[], None] = lambda: None,
    at_least_s: float = 0.01,
) -> dict[str, Times]:
    """Seconds per call, measured in turns, so that other load on the machine affects all contenders alike.

    The first call is not counted. A repeat is as many calls as take `at_least_s` (one if that is 0). `ready` is called before
    each repeat.
    """
    calls = {name: _calls(run, device, at_least_s) for name, run in runs.items()}
    times = {name: Times([], []) for name in runs}
    for turn in range(repeats):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            ready()
            synchronise(device)
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(calls[name]):
                runs[name]()
            synchronise(device)
            times[name].wall.append((time.perf_counter() - start) / calls[name])
            times[name].cpu.append((time.process_time() - start_cpu) / calls[name])
    return times


def _calls(run: Callable[[], Any], device: torch.device, at_least_s: float) -> int:
    """The number of calls that take `at_least_s`. The first call may fill caches, so it decides only if it takes very long."""
    took = 0.0
    for _ in range(2):
        start = time.perf_counter()
        run()
        synchronise(device)
        took = time.perf_counter() - start
        if took > 20 * at_least_s:
            return 1
    return max(1, round(at_least_s / max(1e-9, took)))


# ---- memory ----


def added_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of one call above the level before it; None where it cannot be measured (neither Linux nor CUDA)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system; a call that reuses it would add nothing
        Path("/proc/self/clear_refs").write_text("5")  # reset the highest resident size
    except (AttributeError, OSError):  # another C library, or a container that forbids it
        return None
    before = resident_bytes()
    run()
    return max(0, _status_bytes("VmHWM") - before)


def resident_bytes() -> int:
    """Memory of this process in use, of Linux; freed memory is returned first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status_bytes("VmRSS")


@contextmanager
def no_freed_memory_held() -> Iterator[None]:
    """Return each freed block of 64 KiB to the system at once, so that resident memory is memory in use. GNU's C library.

    By default it keeps blocks of up to 32 MiB, once one of that size was freed, in a heap that can only shrink at its end:
    use this before large blocks are freed.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 64 << 10)
    try:
        yield
    finally:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 32 << 20)


def peak_above(run: Callable[[], Any], before: int) -> int:
    """Peak memory of this process during one call, above an earlier `resident_bytes`. Linux."""
    resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


# ---- rows ----


def make_rows(
    case: str, notes: Mapping[str, str], times: Mapping[str, Times], figures: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Row]:
    """A row for each contender of a case, with ratios; `figures` are further fields of a row, by the contender's name."""
    return with_ratios(
        [
            Row(case, f"{name}: {note}", times[name].median_s, times[name].spread, **(figures or {}).get(name, {}))
            for name, note in notes.items()
        ]
    )


def cpu_figure(times: Times, device: torch.device) -> dict[str, float]:
    """CPU seconds of the best repeat, which other processes affect the least."""
    return {"cpu_s": min(times.cpu)} if device.type == "cpu" else {}


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows of one case, each with the ratios of its time and bytes to those of every other row."""
    made = []
    for row in rows:
        others = [other for other in rows if other is not row]
        own = row.wire_bytes if row.wire_bytes is not None else row.added_bytes
        sizes = {other.name: other.wire_bytes if row.wire_bytes is not None else other.added_bytes for other in others}
        made.append(
            replace(
                row,
                ratio_to={other.name: row.median_s / other.median_s for other in others},
                bytes_ratio_to={name: own / size for name, size in sizes.items() if own is not None and size},
            )
        )
    return made


@contextmanager
def replaced(module: Any, **attributes: Any) -> Iterator[None]:
    """Context in which attributes of a module have other values."""
    before = {name: getattr(module, name) for name in attributes}
    for name, value in attributes.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
