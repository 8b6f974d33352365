"""Runs tasks in spawned worker processes, or in this one; results come back as they are finished.

Why not a pool of the standard library: its workers live on when the parent is killed, and hang when a worker is.
Here a worker ends with its parent, and a worker's death is an error.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

from clae_dist.errors import DataError
from clae_dist.lifetime import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Task, Callable[[int], None]], Result]


def run_tasks(
    work: Work[Task, Result], tasks: Sequence[Task], num_workers: int, progress: Callable[[int], None]
) -> Generator[Result, None, None]:
    """Yields the results of `work(task, report)` in order of completion; `progress(n)` is called about once a second.

    What `work` raises is raised here. `num_workers` 0 works in this process. Closing the generator ends the workers.
    To be called from the main thread. Raises DataError when a worker dies.
    """
    if num_workers == 0:
        for task in tasks:
            yield work(task, progress)
        return
    workers = _start(work, min(num_workers, len(tasks)))
    try:
        yield from _collect(workers, list(tasks), progress)
    finally:
        for connection, process in workers.items():
            connection.close()
            process.kill()  # they only write temporary files
            process.join()


def _start(work: Work[Any, Any], count: int) -> dict[Connection, Any]:
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, Any] = {}
    # Ctrl-C goes to the whole process group; the workers inherit that it is ignored, and the parent alone reacts.
    # (A blocked signal would not do: multiprocessing unblocks it when it starts its resource tracker.)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(os.getpid(), theirs, work), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
    finally:
        signal.signal(signal.SIGINT, before)
    return workers


def _collect(workers: dict[Connection, Any], tasks: list[Any], progress: Callable[[int], None]) -> Iterator[Any]:
    pending = tasks[::-1]
    busy = set()
    for connection in workers:
        with _alive(workers[connection]):
            connection.send(pending.pop())
        busy.add(connection)
    while busy:
        for connection in cast("list[Connection]", wait(list(busy), timeout=1.0)):
            with _alive(workers[connection]):
                kind, value = connection.recv()
                if kind == "done":
                    busy.discard(connection)
                    if pending:
                        connection.send(pending.pop())
                        busy.add(connection)
            if kind == "progress":
                progress(value)
            elif kind == "failed":
                raise value
            else:
                yield value
        progress(0)


@contextmanager
def _alive(process: Any) -> Iterator[None]:
    """Turns a pipe's end into an error that says what happened to the worker."""
    try:
        yield
    except (EOFError, ConnectionError):
        process.join()
        raise DataError(
            f"a worker process died (exit code {process.exitcode}; -9 is what a machine short of memory does); "
            f"run the same command with fewer --workers: it resumes."
        ) from None


def _serve(parent: int, connection: Connection, work: Work[Any, Any]) -> None:
    """The worker: tasks in, results out, until the parent closes the pipe or is gone."""
    end_with_parent(parent)  # in the middle of a task, too
    try:
        while True:
            task = connection.recv()
            try:
                result = work(task, lambda count: connection.send(("progress", count)))
            except ConnectionError:
                return
            except Exception as error:
                error.add_note("".join(traceback.format_exception(error)))
                connection.send(("failed", error))
                return
            connection.send(("done", result))
    except (EOFError, ConnectionError):
        return
