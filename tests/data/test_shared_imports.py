"""A fork server that is a fork of the rank: loader processes share its imports, keep nothing else of it, and end with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from multiprocessing import forkserver as implementation
from pathlib import Path

import psutil
import pytest

from clae_dist import lifetime
from tests import processes

ROOT = Path(__file__).parents[2]
RANK = """
import json, os, signal, socket, sys
from clae_dist import lifetime
from clae_dist.data.loader import forkserver, start_loader_process

def work(pipe):
    start_loader_process()
    handler = signal.getsignal(signal.SIGTERM)
    pipe.send({
        "server": os.getppid(),
        "imported before": "only here" in sys.modules,
        "script is open": any(os.path.realpath(f"/proc/self/fd/{number}") == __file__ for number in range(3, 256)),
        "stdout": sys.stdout is sys.__stdout__,
        "handler": getattr(handler, "__name__", str(handler)),
        "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
    })
    pipe.recv()

def handle(*_):
    raise SystemExit

if __name__ == "__main__":
    sys.modules["only here"] = sys
    lifetime.dedicate_process()
    signal.signal(signal.SIGTERM, handle)
    print("before", end=" ")
    kept = open(__file__)
    sys.stdout = sys.stderr
    assert lifetime.fork_server_from_here("clae_dist.data.preload")
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    sys.stdout = sys.__stdout__
    ours, theirs = forkserver().Pipe()
    process = forkserver().Process(target=work, args=(theirs,))
    process.start()
    theirs.close()
    print(json.dumps(ours.recv()), flush=True)
    ours.recv() if "stay" in sys.argv else ours.send(None)
    process.join()
"""


@pytest.mark.parametrize("ending", ["is killed", pytest.param("returns", marks=pytest.mark.slow)])
def test_loaders_share_the_imports_of_the_rank_and_end_with_it(tmp_path: Path, ending: str) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    mark = processes.new_mark()
    environment = {**os.environ, **mark, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), "stay" if ending == "is killed" else "leave"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as rank:
        try:
            assert rank.stdout is not None
            word, _, line = rank.stdout.readline().partition(" ")
            loader = json.loads(line)
            assert word == "before"
            assert loader["imported before"]  # a new interpreter would not have it
            assert not loader["script is open"]
            assert loader["stdout"]
            assert loader["handler"] == "_end_soon"
            assert loader["blocked"] == []
            if ending == "is killed":
                server = psutil.Process(loader["server"])
                assert (server.ppid(), server.name()) == (rank.pid, "clae-loaders")
                server.children()[0].send_signal(signal.SIGSTOP)
                rank.kill()
            assert rank.stdout.read() == ""  # what was buffered before the fork is printed once
            assert rank.wait() == (-signal.SIGKILL if ending == "is killed" else 0)
            processes.wait_until_gone(mark)
        finally:
            processes.end(mark)


def test_no_fork_of_a_users_process_or_of_one_with_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that another thread holds would stay locked in the fork; a notebook has state that is not ours to copy."""
    monkeypatch.setattr(implementation, "ensure_running", lambda: pytest.fail("a server was started"))
    assert not lifetime._dedicated
    assert not lifetime.fork_server_from_here("clae_dist.data.preload")
    monkeypatch.setattr(lifetime, "_dedicated", True)
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert not lifetime.fork_server_from_here("clae_dist.data.preload")
    finally:
        end.set()
        thread.join()
