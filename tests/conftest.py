from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import RankPool


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """ranks.run(world_size, function, *arguments) on real gloo processes."""
    pool = RankPool()
    yield pool
    pool.close()
