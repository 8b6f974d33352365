from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hosts.cluster import Hosts
from tests.hosts.needs import require_hosts


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Three hosts on one network."""
    require_hosts()
    with Hosts(3) as cluster:
        yield cluster
