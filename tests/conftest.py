from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

from tests.ranks import RankPool


@pytest.fixture(scope="session", autouse=True)
def _hears_ctrl_c() -> None:
    """A shell starts background jobs with SIGINT ignored, which the commands under test would inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """ranks.run(world_size, function, *arguments) on real gloo processes."""
    pool = RankPool()
    yield pool
    pool.close()
