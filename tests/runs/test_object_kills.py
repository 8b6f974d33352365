"""Kills at every request of a save and within uploads: no torn checkpoint is taken, none that was committed is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch

from clae_dist.runs.checkpoint import Writer, load_checkpoint, remove_leftovers
from clae_dist.staging import copy_folder, staging_folder
from tests.checkpoints import CPU, assert_same, pieces_of, write_checkpoint
from tests.fault_proxy import Request
from tests.object_server import ObjectServer
from tests.processes import environment, started
from tests.runs.killed_in_bucket import NEW, OLD


@dataclass(frozen=True)
class Kill:
    """The moment of a kill: at the request `number`, before or after it is carried out, or after `num_bytes` of bodies."""

    number: int = -1
    carried_out: bool = False
    num_bytes: int = -1


class Saver:
    """A process that forks others, which save."""

    def __init__(self, process: subprocess.Popen[str], bucket: ObjectServer) -> None:
        self._process, self._bucket = process, bucket
        self._count = 0

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n")
        self._process.stdin.flush()

    def save(self, kill: Kill) -> tuple[bool, bool]:
        """Save in a process that is killed at that moment, if it comes: (killed, committed)."""
        faults, num_before = self._bucket.faults, len(self._bucket.faults.requests)
        self._count += 1
        self._write(str(self._count))
        pid = int(self._line().removeprefix("pid "))

        def choose(request: Request) -> str:
            if request.number - num_before == kill.number:
                end(pid)
                return "lost" if kill.carried_out else "reset"
            return ""

        def carried(num_bytes: int) -> None:
            if 0 <= kill.num_bytes < num_bytes:
                end(pid)

        faults.choose, faults.num_carried, faults.carried = choose, 0, carried
        self._write("begin")
        committed, line = False, self._line()
        if line == "committed":
            committed, line = True, self._line()
        faults.choose, faults.carried = (lambda request: ""), (lambda num_bytes: None)
        assert line in ("ended 0", f"ended {-signal.SIGKILL}"), line
        return line != "ended 0", committed


@pytest.fixture
def saver(bucket: ObjectServer, tmp_path: Path) -> Iterator[Saver]:
    pipes = {"stdin": subprocess.PIPE, "stderr": None}
    command = (sys.executable, "-m", "tests.runs.killed_in_bucket", staging_folder(bucket.url))
    with started(*command, env=environment(**bucket.environment), **pipes) as process:
        yield Saver(process, bucket)


def check(bucket: ObjectServer, committed: bool) -> int:
    """The step that the same machine and another one resume from, with the tensors that were written."""
    here, elsewhere = staging_folder(bucket.url), copy_folder(bucket.url)
    remove_leftovers(here)
    shutil.rmtree(elsewhere, ignore_errors=True)
    steps = set()
    for folder in (here, elsewhere):
        checkpoint = load_checkpoint(folder, pytest.fail)  # not even a damaged one
        assert checkpoint is not None
        assert_same(checkpoint, OLD if checkpoint.step == 1 else NEW)
        steps.add(checkpoint.step)
    (step,) = steps
    assert step == 2 or not committed
    folders = {name.split("/")[3] for name in bucket.names("runs/first/checkpoints/")}
    assert all(any(name.startswith(f"step-{kept:08d}.") for kept in (1, 2)) for name in folders)
    return step


def end(pid: int) -> None:
    with suppress(ProcessLookupError):  # killed already, at a byte before
        os.kill(pid, signal.SIGKILL)


def moments(bucket: ObjectServer, saver: Saver) -> Iterator[Kill]:
    """Every request of an undisturbed save, before and after it, and 32 positions in its bodies."""
    before = len(bucket.faults.requests)
    assert saver.save(Kill()) == (False, True)
    num_requests, num_bytes = len(bucket.faults.requests) - before, bucket.faults.num_carried
    assert num_requests >= 10
    assert check(bucket, committed=True) == 2
    for number in range(num_requests):
        yield from (Kill(number), Kill(number, carried_out=True))
    for part in range(32):
        yield Kill(num_bytes=num_bytes * part // 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bucket", "every"), [("s3", 1), ("gs", 2), pytest.param("gs", 1, marks=pytest.mark.long)], indirect=["bucket"]
)
def test_kills_of_saves(every: int, bucket: ObjectServer, saver: Saver) -> None:
    """At all of these moments, or at every second one."""
    run_dir, found, num_kills = staging_folder(bucket.url), [], 0
    write_checkpoint(run_dir, 1, OLD)
    for kill in islice(moments(bucket, saver), every - 1, None, every):
        if found[-1:] != [1]:  # the old one is gone
            bucket.clear()
            shutil.rmtree(run_dir, ignore_errors=True)
            write_checkpoint(run_dir, 1, OLD)
        killed, committed = saver.save(kill)
        num_kills += killed
        found.append(check(bucket, committed))
    assert num_kills >= 50 // every
    assert {1, 2} == set(found)
    print(f"{num_kills} kills: {found.count(1)} resume from the old checkpoint, {found.count(2)} from the new one")


def test_a_save_does_not_wait_for_the_bucket(bucket: ObjectServer) -> None:
    """The store answers nothing until training has its memory back: a `begin` that waits for it never returns."""
    released = threading.Event()

    def choose(request: Request) -> str:
        assert released.wait(60)
        return ""

    bucket.faults.choose = choose
    writer = Writer(staging_folder(bucket.url), 0, 1, "attempt0", CPU)
    writer.begin(1, [pieces_of(f"model/{i}", torch.zeros(100_000), 0, 1, sharded=False) for i in range(6)])
    released.set()
    writer.join()
    writer.commit(1, "ddp", {"images_seen": 1}, 1, 0.0)
    writer.join()
    assert not writer.problem
