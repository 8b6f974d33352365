"""CPU cores that this process may use, and their division among the ranks of a machine."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores in this process's affinity mask. A cgroup's quota is not counted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(local_size: int) -> int:
    """Threads of torch for each of `local_size` ranks on this machine."""
    return max(1, usable_cores() // local_size)


def loader_processes(local_size: int = 1) -> int:
    """Loader processes for each of `local_size` ranks on this machine: its cores but one, at most 8."""
    return max(0, min(8, usable_cores() // local_size - 1))
