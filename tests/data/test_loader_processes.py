"""Loader processes end with the process that they load for, in every way that it, their server or they themselves may die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from clae_dist.data.synthetic import write_synthetic_set
from tests import processes
from tests.processes import Process

# A rank, as far as data is concerned: asked by a line, it takes another batch or leaves as a rank that hangs does.
LOADS = """
import os, sys
from clae_dist.config import Batch, Config, Data
from clae_dist.data.loader import load
from clae_dist.data.shard_set import open_shards
from clae_dist.world import World

if __name__ == "__main__":
    data = Data(shards=sys.argv[1], image_size=16, workers=2)
    batches = load(open_shards(data), Config(data=data, batch=Batch(global_size=8)), World.single("cpu"), 0, 1000)
    while True:
        next(batches)
        print("loaded", flush=True)
        if sys.stdin.readline().strip() == "leave":
            os._exit(6)
"""


@contextmanager
def loading(folder: Path) -> Iterator[tuple[Process, dict[str, str]]]:
    """A process that has loaded a batch with two loader processes, and its mark."""
    write_synthetic_set(folder / "shards", 40, 16)
    (folder / "loads.py").write_text(LOADS)
    mark = processes.new_mark()
    command = [sys.executable, folder / "loads.py", folder / "shards"]
    with processes.started(*command, mark=mark, stdin=subprocess.PIPE, stderr=None) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loaded\n"
        assert len(loaders(process)) == 2
        yield process, mark


def loaders(process: Process) -> list[psutil.Process]:
    """Grandchildren: their parent is the fork server."""
    return [below for child in psutil.Process(process.pid).children() for below in child.children()]


@pytest.mark.parametrize("way", ["kill -9", pytest.param("as a rank that hangs", marks=pytest.mark.slow)])
def test_loader_processes_end_with_their_rank_even_while_one_is_stopped(way: str, tmp_path: Path) -> None:
    """Two kills of ranks left five processes and 2.1 GB for good: loaders watched their server, and the server its loaders."""
    with loading(tmp_path) as (process, mark):
        loaders(process)[0].send_signal(signal.SIGSTOP)
        if way == "kill -9":
            process.kill()
        else:
            assert process.stdin is not None
            process.stdin.write("leave\n")
            process.stdin.flush()
        assert process.wait(60) == (-signal.SIGKILL if way == "kill -9" else 6)
        processes.wait_until_gone(mark)


@pytest.mark.slow
def test_loader_processes_end_with_their_server(tmp_path: Path) -> None:
    with loading(tmp_path) as (process, mark):
        (server,) = {loader.ppid() for loader in loaders(process)}
        os.kill(server, signal.SIGKILL)
        tracker = {child.pid for child in psutil.Process(process.pid).children() if child.pid != server}
        processes.wait_until_gone(mark, but=frozenset({process.pid, *tracker}))
