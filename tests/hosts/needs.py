"""What some tests need of a machine: they are skipped with the reason where it is missing."""

from __future__ import annotations

import pytest

from tests.hosts.cluster import why_not


def require_hosts() -> None:
    """Skips unless this machine can have hosts of network namespaces."""
    require(why_not())


def require(problem: str) -> None:
    """Skips with `problem` unless it is ""; launch/test.sh installs what is missing in CI, and lists what was skipped."""
    if problem:
        pytest.skip(problem)
