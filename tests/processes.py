"""Processes that tests start: commands of this checkout, their output, and the wait until nothing of them is left.

A process is found by a mark in its environment, which all that it starts inherits.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[1]
CLAE = (sys.executable, "-m", "clae_dist")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module", "clae_dist")
Completed = subprocess.CompletedProcess[str]
Process = subprocess.Popen[str]
_MARK = "CLAE_TEST_MARK"
GONE_WITHIN_S = 10.0  # "within seconds", on a busy machine


def environment(**changes: str) -> dict[str, str]:
    """The environment of this process, with this checkout, one thread and unbuffered output, and `changes`."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **changes}


def run(*command: object, env: Mapping[str, str] | None = None, cwd: Path = ROOT, **options: Any) -> Completed:
    """Run a command to its end, for 300 s at most, with its output captured. The exit code is for the caller to check."""
    settings = {"capture_output": True, "text": True, "timeout": 300, "check": False, **options}
    return subprocess.run([str(word) for word in command], cwd=cwd, env=env or environment(), **settings)


def clae(*words: object, **options: Any) -> Completed:
    """`clae WORDS`, run to its end: see `run`."""
    return run(*CLAE, *words, **options)


def popen(*command: object, env: Mapping[str, str] | None = None, cwd: Path = ROOT, **options: Any) -> Process:
    """Start a command in a session of its own; stdout and stderr are one pipe unless `options` say otherwise."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True, **options}
    return subprocess.Popen([str(word) for word in command], cwd=cwd, env=env or environment(), **pipes)


@contextmanager
def started(
    *command: object, env: Mapping[str, str] | None = None, mark: Mapping[str, str] | None = None, **options: Any
) -> Iterator[Process]:
    """A process, started as by `popen`. All that it has started is killed at the end, found by `mark` or one made here."""
    mark = mark or new_mark()
    with popen(*command, env={**(env or environment()), **mark}, **options) as process:
        try:
            yield process
        finally:
            end(mark)


def read_until(process: Process, words: str) -> str:
    """The output up to the first line that holds `words`, whatever the number of spaces between them."""
    output = ""
    assert process.stdout is not None
    for line in process.stdout:
        output += line
        if words in " ".join(line.split()):
            return output
    pytest.fail(f"the process ended before {words!r}:\n{output}")


def finish(process: Process, timeout_s: float = 600.0) -> tuple[int, str]:
    """The exit code, and the output from here on."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"{process.args} did not end in {timeout_s:g} s:\n{output}") from None
    return process.returncode, output


def new_mark() -> dict[str, str]:
    """An environment variable that all descendants of a process inherit, with a value of its own."""
    return {_MARK: uuid.uuid4().hex}


def marked(mark: Mapping[str, str]) -> list[psutil.Process]:
    """Processes with the mark that still run or are stopped; zombies have ended."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{_MARK}={mark[_MARK]}".encode() in path.read_bytes():
                process = psutil.Process(int(path.parent.name))
                if process.status() != psutil.STATUS_ZOMBIE:
                    processes.append(process)
        except (OSError, psutil.NoSuchProcess):
            continue
    return processes


def wait_until_gone(mark: Mapping[str, str], within_s: float = GONE_WITHIN_S, but: frozenset[int] = frozenset()) -> None:
    """Fail when processes with the mark, `but` those with these ids, are left after `within_s`."""
    deadline = time.monotonic() + within_s
    while left := [process for process in marked(mark) if process.pid not in but]:
        if time.monotonic() > deadline:
            raise AssertionError(f"{within_s:g} s later there still are:\n" + "\n".join(map(_describe, left)))
        time.sleep(0.1)


def end(mark: Mapping[str, str]) -> None:
    """Kill all processes with the mark."""
    for process in marked(mark):
        process.kill()


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} (parent {process.ppid()}, {process.status()}): {' '.join(process.cmdline())[:160]}"
    except psutil.NoSuchProcess:
        return f"{process.pid} (gone now)"
