"""How pytest-xdist shares tests between two workers: a file at a time, all whole runs on one worker, slow tests last.

xdist's own `--dist loadgroup` writes the group to an attribute that pytest 9.2 no longer reads, and sends every test alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

_HERE = Path(__file__).parent
_WHOLE_RUNS = ["test_main_job.py", "launchers", "hosts", "chaos"]


def place(item: pytest.Item, distributed: bool) -> tuple[bool, int]:
    """The sort key of a test: slow tests come last. Two workers begin with whole runs, one process ends with them."""
    name = item.path.relative_to(_HERE).parts[0]
    after_others = len(_WHOLE_RUNS) if distributed else -1
    return item.get_closest_marker("slow") is not None, _WHOLE_RUNS.index(name) if name in _WHOLE_RUNS else after_others


def units(node_ids: Sequence[str]) -> dict[str, str]:
    """The unit of work of each test: neighbours of one file, or of all whole runs, which start several processes each."""
    names: dict[str, str] = {}
    last, number = "", 0
    for node_id in node_ids:
        path = node_id.split("::", 1)[0]
        group = "whole runs" if path.split("/")[1] in _WHOLE_RUNS else path
        number += group != last
        names[node_id], last = f"{number} {group}", group
    return names


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Sends a unit to a worker."""

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        super().__init__(config, log)
        self._units: dict[str, str] = {}

    def _split_scope(self, nodeid: str) -> str:
        self._units = self._units or units(self.collection)
        return self._units[nodeid]
