"""What some tests need of a machine: they are skipped with the reason where it is missing, and fail in CI as root."""

from __future__ import annotations

import os
import sys

import pytest

from tests.hosts.cluster import why_not


def require_hosts() -> None:
    """Skips unless this machine can have hosts of network namespaces."""
    require(why_not())


def require(problem: str) -> None:
    """Skips with `problem` unless it is "". Fails in CI as root on Linux, where launch/test.sh installs what is missing."""
    if not problem:
        return
    if os.environ.get("CI") == "true" and sys.platform == "linux" and os.geteuid() == 0:
        pytest.fail(problem)
    pytest.skip(problem)
