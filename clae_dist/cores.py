"""CPU cores that this process may use, and their division among the ranks of a machine."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MOST_LOADERS = 16  # a rank; each needs shared memory for its batches


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores in this process's affinity mask, or fewer where a container's CPU limit allows fewer; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(cgroup)
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(cgroup: Path = _CGROUP) -> float | None:
    """Cores that the cgroup (v2 or v1) allows, None without a limit."""
    v2, v1 = cgroup / "cpu.max", cgroup / "cpu"
    if v2.exists():
        quota, period = v2.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    if (v1 / "cpu.cfs_quota_us").exists():
        quota_us = int((v1 / "cpu.cfs_quota_us").read_text())
        return None if quota_us <= 0 else quota_us / int((v1 / "cpu.cfs_period_us").read_text())
    return None


def threads_per_rank(local_size: int) -> int:
    """Threads of torch for each of `local_size` ranks on this machine."""
    return max(1, usable_cores() // local_size)


def loader_processes(local_size: int = 1) -> int:
    """Loader processes for each of `local_size` ranks on this machine: its share of the cores but one, at most 16."""
    return max(0, min(_MOST_LOADERS, usable_cores() // local_size - 1))
