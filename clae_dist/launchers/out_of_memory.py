"""The kernel's count of processes that it has killed because memory was used up, in this process's control group."""

from __future__ import annotations

from pathlib import Path

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def num_killed(proc: Path = _PROC, groups: Path = _GROUPS) -> int:
    """The count so far: of the control group (version 2, then 1), else of the machine; 0 if the kernel has none."""
    for path in (*_counters(proc, groups), proc / "vmstat"):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for words in map(str.split, lines):
            if len(words) == 2 and words[0] == "oom_kill":
                return int(words[1])
    return 0


def _counters(proc: Path, groups: Path) -> list[Path]:
    """Files that may hold the count. Inside a container, the group's own path may not be visible, and its root is the group."""
    try:
        memberships = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        return []
    found: list[Path] = []
    for _, controllers, path in (entry for entry in memberships if len(entry) == 3):
        if not controllers:
            found = [folder / "memory.events" for folder in (groups / path.lstrip("/"), groups)] + found
        elif "memory" in controllers.split(","):
            root = groups / "memory"
            found += [folder / "memory.oom_control" for folder in (root / path.lstrip("/"), root)]
    return found
