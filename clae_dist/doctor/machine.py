"""Check devices, and the limits set by a container or an administrator."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from clae_dist.cores import cpu_quota, loader_processes, usable_cores
from clae_dist.doctor.finding import GIB, Finding

SHM_BYTES_A_WORKER = 256 * 1024**2  # two prefetched batches of decoded 224-pixel views
OPEN_FILES = 4096


def devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
            free, total = torch.cuda.mem_get_info(index)
            found = f"{name}, compute capability {major}.{minor}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
            if free < total / 2:
                yield Finding("warning", f"gpu {index}", found, "another process uses its memory; nvidia-smi shows which.")
            else:
                yield Finding("ok", f"gpu {index}", found)
        return
    if torch.version.cuda and shutil.which("nvidia-smi"):
        advice = f"nvidia-smi exists, but torch for CUDA {torch.version.cuda} finds no device; the driver may be too old."
        yield Finding("warning", "gpu", "none usable", advice)
    yield Finding("ok", "device", f"CPU, {usable_cores()} cores usable, {torch.get_num_threads()} torch threads")


def limits(root: Path = Path("/sys/fs/cgroup")) -> Iterator[Finding]:
    host, quota, memory = os.cpu_count() or 1, cpu_quota(root), memory_limit(root)
    if quota is not None and quota < 1:
        advice = "a rank and its loader process need a core each; raise the container's CPU limit."
        yield Finding("warning", "cpu limit", f"{quota:g} cores by cgroup, {host} on the host", advice)
    else:
        by_cgroup = "" if quota is None else f" (the cgroup allows {quota:g})"
        yield Finding("ok", "cpu limit", f"{usable_cores(root)} of the host's {host} cores{by_cgroup}")
    if memory is not None and memory < 4 * GIB:
        yield Finding(
            "warning", "memory limit", f"{memory / GIB:.1f} GiB by cgroup", "a rank needs about 1 GiB before its first batch."
        )
    else:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield Finding("ok", "memory", f"{min(memory or physical, physical) / GIB:.1f} GiB")


def memory_limit(root: Path) -> int | None:
    """Bytes that the cgroup (v2 or v1) allows, None without a limit."""
    for path in (root / "memory.max", root / "memory" / "memory.limit_in_bytes"):
        if path.exists():
            text = path.read_text().strip()
            return None if text == "max" or int(text) > 2**60 else int(text)
    return None


def shared_memory(path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Loader processes send their batches through shared memory, of which a container has 64 MiB by default."""
    if not path.exists():
        yield Finding("warning", "shared memory", f"no {path}", "loader processes need it; set data.workers=0.")
        return
    free, workers = shutil.disk_usage(path).free, max(1, loader_processes())
    found = f"{free / GIB:.2f} GiB free in {path}"
    if free < SHM_BYTES_A_WORKER * workers:
        needed = f"{SHM_BYTES_A_WORKER * workers / GIB:.1f}"
        advice = (
            f"{workers} loader processes at 224 pixels need {needed} GiB; docker run --shm-size={needed}g, or data.workers=0."
        )
        yield Finding("warning", "shared memory", found, advice)
    else:
        yield Finding("ok", "shared memory", found)


def open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        limit = min(OPEN_FILES, hard) if hard > 0 else OPEN_FILES
        advice = f"many shards and loader processes need more; run `ulimit -n {limit}` first."
        yield Finding("warning", "open files", f"{soft} allowed", advice)
    else:
        yield Finding("ok", "open files", f"{soft} allowed" if soft > 0 else "unlimited")


def clock() -> Iterator[Finding]:
    """Detect a clock that was never set. (Clocks that differ between nodes, which break TLS and tokens, are not detected.)"""
    newest = max(Path(__file__).stat().st_mtime, Path(sys.executable).stat().st_mtime)
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if time.time() < newest - 86_400:
        yield Finding("problem", "clock", f"{now}, older than files on the disk", "set the clock (timedatectl, chrony).")
    else:
        yield Finding("ok", "clock", now)
