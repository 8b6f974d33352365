"""Shared between two workers, a file's tests stay on one of them."""

from __future__ import annotations

import re
import sys

import pytest

from tests import processes
from tests.grouping import units


def test_a_unit_is_a_file_and_all_whole_runs_are_one() -> None:
    """A file's slow tests come last: as neighbours of others they are a unit of their own."""
    collected = ["tests/launchers/test_a.py::one", "tests/hosts/test_b.py::two", "tests/data/test_c.py::three[a::b]"]
    collected += ["tests/test_d.py::four", "tests/data/test_c.py::slow", "tests/launchers/test_a.py::slow"]
    names = [units(collected)[node_id] for node_id in collected]
    assert names == [
        *["1 whole runs"] * 2,
        "2 tests/data/test_c.py",
        "3 tests/test_d.py",
        "4 tests/data/test_c.py",
        "5 whole runs",
    ]


@pytest.mark.slow
def test_two_workers_take_a_file_each() -> None:
    """Groups of pytest-xdist were not seen with a newer pytest: every test went to whichever worker was free."""
    files = ("tests/test_progress.py", "tests/tracking/test_console.py")
    options = ("-p", "no:cacheprovider", "-v", "-n", 2, "--dist", "loadfile", "--no-loadscope-reorder")
    output = processes.run(sys.executable, "-m", "pytest", *options, *files, check=True).stdout
    pairs = set(re.findall(r"^\[(gw\d)\].* PASSED (tests/[\w/]*\.py)", output, re.MULTILINE))
    assert {name for _, name in pairs} == set(files)
    assert len(pairs) == 2, pairs
