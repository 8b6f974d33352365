"""Every process that a command under test has started, found by a mark in its environment, and the wait until none is left."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import psutil

_NAME = "CLAE_TEST_MARK"
GONE_WITHIN_S = 10.0  # "within seconds", on a busy machine


def new_mark() -> dict[str, str]:
    """An environment variable that all descendants of a process inherit, with a value of its own."""
    return {_NAME: uuid.uuid4().hex}


def marked(mark: dict[str, str]) -> list[psutil.Process]:
    """Processes with the mark that still run or are stopped; zombies have ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{_NAME}={mark[_NAME]}".encode() in path.read_bytes():
                process = psutil.Process(int(path.parent.name))
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        except (OSError, psutil.NoSuchProcess):
            continue
    return found


def wait_until_gone(mark: dict[str, str], within_s: float = GONE_WITHIN_S, but: frozenset[int] = frozenset()) -> None:
    """Fails when processes with the mark, `but` those with these ids, are left after `within_s`."""
    deadline = time.monotonic() + within_s
    while left := [process for process in marked(mark) if process.pid not in but]:
        if time.monotonic() > deadline:
            raise AssertionError(f"{within_s:g} s later there still are:\n" + "\n".join(map(_describe, left)))
        time.sleep(0.1)


def end(mark: dict[str, str]) -> None:
    """Kills all that is left, for the end of a test that failed."""
    for process in marked(mark):
        process.kill()


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} (parent {process.ppid()}, {process.status()}): {' '.join(process.cmdline())[:160]}"
    except psutil.NoSuchProcess:
        return f"{process.pid} (gone now)"
