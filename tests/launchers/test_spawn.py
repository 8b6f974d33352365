"""Ranks of this machine, as processes: how they end."""

from __future__ import annotations

import atexit
import json
import multiprocessing.forkserver
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from torch.utils.data import DataLoader

from clae_dist.data.loader import forkserver
from clae_dist.errors import FAILED, OK
from clae_dist.launchers.local import spawn
from clae_dist.launchers.rank import Ending
from clae_dist.world import connect


class _DiesWithPython:
    """What a thread of gloo does that drops its last tensor while Python ends, now and then."""

    def __del__(self, ends: Callable[[], bool] = sys.is_finalizing, abort: Callable[[], None] = os.abort) -> None:
        if ends():
            abort()


_KEPT: list[_DiesWithPython] = []


def _leaves_a_thread(folder: Path) -> Ending:
    with connect() as world:
        ranks = world.gather_objects(world.rank)
    _KEPT.append(_DiesWithPython())
    atexit.register((folder / str(world.rank)).write_text, "registered for the end")
    return Ending(OK, str(ranks))


def _is_killed() -> Ending:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return Ending(OK, "")


def test_a_rank_that_has_finished_is_not_aborted_by_the_end_of_python(tmp_path: Path) -> None:
    assert spawn(2, _leaves_a_thread, tmp_path) == Ending(OK, "[0, 1]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_killed_rank_is_named_with_what_the_caller_advises() -> None:
    assert spawn(2, _is_killed) == Ending(FAILED, "rank 1 of 2 was killed by SIGKILL.", again=True)
    assert spawn(2, _is_killed, advice="Do this.") == Ending(FAILED, "rank 1 of 2 was killed by SIGKILL. Do this.", again=True)


def _describes_itself() -> Ending:
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    facts: list[object] = [os.environ.get("SET_LATER"), os.getppid(), server._forkserver_pid, server._forkserver_address]
    facts.append(len(os.listdir("/proc/self/task")))
    print("a line of a rank", flush=True)
    return Ending(OK, json.dumps(facts))


def test_a_rank_has_the_environment_and_the_output_of_its_launcher_and_no_fork_server_yet(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server of a first launch may be older than what the process has set since."""
    monkeypatch.delenv("SET_LATER", raising=False)
    unset, parent, *_ = json.loads(spawn(1, _describes_itself).message)
    monkeypatch.setenv("SET_LATER", "yes")
    capfd.readouterr()
    later, again, *own_server, threads = json.loads(spawn(1, _describes_itself).message)
    assert (unset, later) == (None, "yes")
    assert parent == again  # one server, which has imported torch once
    assert own_server == [None, None]
    assert threads <= 2
    assert capfd.readouterr().out == "a line of a rank\n"


def _signals_the_server() -> Ending:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getppid(), number)
    time.sleep(0.3)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return Ending(OK, f"{sorted(blocked)} {signal.getsignal(signal.SIGTERM) == signal.SIG_DFL}")


def test_a_signal_to_the_whole_job_ends_no_fork_server() -> None:
    assert spawn(1, _signals_the_server) == Ending(OK, "[] True")


def _server() -> Ending:
    return Ending(OK, psutil.Process(os.getppid()).cmdline()[-1])


def _servers() -> str:
    """The command lines of this process's fork servers that run."""
    running = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
    return " ".join(word for one in running for word in one.cmdline())


@pytest.mark.slow
def test_ranks_and_loaders_have_servers_of_their_own_in_one_process() -> None:
    """A program that embeds images and then trains: multiprocessing keeps one server, with the imports of its first user."""
    assert "clae_dist.launchers.preload" in spawn(1, _server).message
    numbers = DataLoader(range(2), num_workers=1, batch_size=None, multiprocessing_context=forkserver())  # type: ignore[arg-type, var-annotated]
    under_way = iter(numbers)
    assert "clae_dist.launchers.preload" in spawn(1, _server).message
    assert list(under_way) == [0, 1]
    assert "clae_dist.launchers.preload" in _servers()
    numbers = DataLoader(range(2), num_workers=1, batch_size=None, multiprocessing_context=forkserver())  # type: ignore[arg-type, var-annotated]
    assert list(numbers) == [0, 1]
    assert "clae_dist.data.preload" in _servers()
