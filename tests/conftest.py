from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.ranks import RankPool

_HERE = Path(__file__).parent
_LAST = ["test_main_job.py", "launchers", "hosts", "chaos"]  # whole runs, in this order after all else
_BEGIN = time.monotonic()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(_HERE).parts[0]
        return _LAST.index(name) if name in _LAST else -1

    items.sort(key=place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where time is short (CI, a slow machine): slow tests do not begin after CLAE_TEST_MINUTES, and are named as skipped."""
    minutes = float(os.environ.get("CLAE_TEST_MINUTES") or "inf")
    if item.get_closest_marker("slow") and time.monotonic() - _BEGIN > 60 * minutes:
        pytest.skip(f"slow, and CLAE_TEST_MINUTES={minutes:g} are over")


@pytest.fixture(scope="session", autouse=True)
def _hears_ctrl_c() -> None:
    """A shell starts background jobs with SIGINT ignored, which the commands under test would inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _leaves_signal_handlers_as_they_were() -> Iterator[None]:
    """A command that runs in this process and leaves its handler behind changes what a later test, or caller, sees."""
    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in heard]
    yield
    after = [signal.getsignal(number) for number in heard]
    for number, handler in zip(heard, before, strict=True):
        signal.signal(number, handler)
    assert after == before, "the test has changed a signal handler of this process"


@pytest.fixture(scope="session", autouse=True)
def _state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where commands note which runs are the user's own: not in the home of whoever runs the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """ranks.run(world_size, function, *arguments) on real gloo processes."""
    pool = RankPool()
    yield pool
    pool.close()
