"""Loader processes forked from the rank itself: its imports are shared, and none of them outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver as implementation

import psutil
import pytest

from clae_dist.config import Config, Data
from clae_dist.data.server import fork_server_from_here
from clae_dist.errors import ConfigError
from clae_dist.launchers import rank
from clae_dist.lifetime import owns_process
from clae_dist.recipe import Recipe

_RANK = """
import os, sys, threading
from clae_dist.data.server import fork_server_from_here, forkserver
from clae_dist.data.loader import start_loader_process

def work(pipe):
    start_loader_process()
    pipe.send((os.getpid(), os.getppid(), "torch" in sys.modules, "only here" in sys.modules))
    pipe.recv()

if __name__ == "__main__":
    sys.modules["only here"] = sys
    print("before", end=" ")
    fork_server_from_here()
    ours, theirs = forkserver().Pipe()
    process = forkserver().Process(target=work, args=(theirs,))
    process.start()
    print(*ours.recv(), flush=True)
    ours.recv() if "stay" in sys.argv else ours.send(None)
    process.join()
"""


def _gone(process: int) -> bool:
    deadline = time.monotonic() + 30
    while psutil.pid_exists(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not psutil.pid_exists(process)


@pytest.mark.parametrize("ending", ["stay", "leave"])
def test_children_share_imports_and_end_with_the_rank(tmp_path: os.PathLike[str], ending: str) -> None:
    script = f"{tmp_path}/rank.py"
    with open(script, "w") as file:
        file.write(_RANK)
    with subprocess.Popen([sys.executable, script, ending], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        word, loader, server, *imported = rank.stdout.readline().split()
        assert word == "before"
        assert imported == ["True", "True"]  # a new interpreter would not have the second
        if ending == "stay":
            assert psutil.Process(int(server)).ppid() == rank.pid
            rank.send_signal(signal.SIGKILL)
        assert rank.wait() == (-signal.SIGKILL if ending == "stay" else 0)
        assert rank.stdout.read() == ""  # what was buffered before the fork is printed once
    assert _gone(int(loader))
    assert _gone(int(server))


def test_a_process_with_threads_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that another thread holds would stay locked in the child."""
    monkeypatch.setattr(implementation, "ensure_running", lambda: pytest.fail("a server was started"))
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        fork_server_from_here()
    finally:
        end.set()
        thread.join()


@pytest.mark.parametrize("owned", [False, True])
def test_a_callers_process_is_not_forked(monkeypatch: pytest.MonkeyPatch, owned: bool) -> None:
    """A copy of a notebook or of pytest would hold locks of its threads and write to its redirected streams."""

    def refuse(*_: object) -> None:
        raise ConfigError("enough")

    forks: list[bool] = []
    monkeypatch.setattr(rank, "fork_server_from_here", lambda: forks.append(True))
    monkeypatch.setattr(rank, "owns_process", lambda: owned)
    monkeypatch.setattr(rank, "connect", refuse)
    config = Config(data=Data(shards="/none", workers=1))
    assert rank.run_rank(Recipe(config, {}), None).message == "enough"
    assert forks == [True] * owned
    assert not owns_process()
