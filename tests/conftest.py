from __future__ import annotations

import multiprocessing.util
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from clae_dist import object_store
from clae_dist.data.manifest import Manifest
from tests import budget, grouping
from tests.google_server import serve_google
from tests.object_server import ObjectServer, serve_s3
from tests.ranks import RankPool
from tests.small_run import Undisturbed, run_undisturbed, write_images, write_recipe

_BEGIN = time.monotonic()
_SPEED = pytest.StashKey[float]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: grouping.place(item, hasattr(config, "workerinput")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> grouping.Scheduling:
    return grouping.Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where time is short (CI, a slow machine): slow tests do not begin after CLAE_TEST_MINUTES, and are named as skipped."""
    minutes = float(os.environ.get("CLAE_TEST_MINUTES") or "inf")
    if item.get_closest_marker("slow") and time.monotonic() - _BEGIN > 60 * minutes:
        pytest.skip(f"slow, and CLAE_TEST_MINUTES={minutes:g} are over")


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        session.config.stash[_SPEED] = budget.measure_speed()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in budget.table(terminalreporter.stats, config.stash[_SPEED]):
        terminalreporter.write_line(line)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """CI fails when the default part of a whole suite takes half as long again as its budget.

    The speed is the lower one of the beginning and the end: a shared machine may be fast for a moment.
    """
    config = session.config
    if hasattr(config, "workerinput"):
        return
    config.stash[_SPEED] = max(config.stash[_SPEED], budget.measure_speed())
    if os.environ.get("CI") != "true":
        return
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    whole = config.args == config.getini("testpaths") and not config.option.keyword
    if reporter is not None and whole and budget.is_exceeded(reporter.stats, config.stash[_SPEED]):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


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
def _leaves_no_temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Killed processes leave temporary files, and torchrun always leaves some. The name of the folder is short, for sockets."""
    tmp_path_factory.getbasetemp()  # of failed tests, which stay
    multiprocessing.util.get_temp_dir()  # of this process, which removes it at its own end
    temporary = tempfile.TemporaryDirectory(prefix="clae-", ignore_cleanup_errors=True)
    with temporary as folder, pytest.MonkeyPatch.context() as patch:
        Path(folder).chmod(0o755)  # PostgreSQL has a user of its own
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """ranks.run(world_size, function, *arguments) on real gloo processes."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The images of whole runs, which no test changes."""
    return write_images(tmp_path_factory.mktemp("images") / "shards")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, shards: Manifest) -> Path:
    """whole_run as a file for commands."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), shards)


@pytest.fixture(scope="session")
def undisturbed(ranks: RankPool, shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """undisturbed(world_size, **settings): the folder of a whole run that nothing disturbed."""
    return run_undisturbed(ranks, shards, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def _s3() -> Iterator[ObjectServer]:
    with serve_s3() as server:
        yield server


@pytest.fixture(scope="session")
def _gs() -> Iterator[ObjectServer]:
    with serve_google() as server:
        yield server


@pytest.fixture
def bucket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectServer:
    """An object store with an empty bucket, which this process's environment names, and staging folders of the test's own.

    It is an S3 server, unless the test names "gs" by `indirect`.
    """
    server: ObjectServer = request.getfixturevalue(f"_{getattr(request, 'param', 's3')}")
    server.clear()
    for name, value in {**server.environment, "CLAE_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    configured: dict[str, dict[str, str]] = {}
    fsspec.config.set_conf_env(configured)
    monkeypatch.setattr(fsspec.config, "conf", configured)  # which fsspec has read when it was imported
    object_store._filesystem.cache_clear()  # it has the environment of another test
    return server
