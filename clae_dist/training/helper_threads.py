"""An error in a helper thread of a rank (checkpoints, tracking, prefetch, watchdog, …) ends the rank at once, with a message.

Otherwise Python would print a traceback, and the run would wait for the thread forever or lose its work.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from clae_dist.causes import cause_of, digest_of, exit_code_of
from clae_dist.data.urls import redact_text
from clae_dist.errors import UNEXPECTED
from clae_dist.runs.mirror import add_to_console, send_file
from clae_dist.staging import shown_path
from clae_dist.training.session import Session
from clae_dist.world import abandon

_HERE = os.sep + "clae_dist" + os.sep


@contextmanager
def failing_threads_end_the_rank(session: Session) -> Iterator[None]:
    """Context in which an uncaught exception in a thread of this package ends the process with code UNEXPECTED."""
    folder, world = session.folder, session.world
    before = threading.excepthook

    def end(failure: Any) -> None:
        if issubclass(failure.exc_type, SystemExit) or not _is_ours(failure.exc_traceback):
            before(failure)
            return
        name = failure.thread.name if failure.thread else "?"
        words = " ".join(redact_text(str(failure.exc_value)).split())[:200]
        log = folder.error_log(world.rank)
        line = f"clae: rank {world.rank} of {world.size}: the thread {name} failed: {failure.exc_type.__name__}: {words}"
        stack = "".join(traceback.format_exception(failure.exc_type, failure.exc_value, failure.exc_traceback))
        with suppress(OSError):
            log.write_text(redact_text(stack))
            line += f" (traceback: {shown_path(log)})"
            send_file(log, folder.path)
        cause = cause_of(failure.exc_value) if failure.exc_value else "code"
        attempt, reason = session.attempt, line.partition(": ")[2]
        digest = digest_of(failure.exc_value) if failure.exc_value else ""
        attempt.end(folder.path, world.rank, world.size, cause, exit_code_of(cause), reason, digest)
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
        with suppress(OSError):
            add_to_console(folder.path, line + "\n")
        abandon(UNEXPECTED)

    threading.excepthook = end
    try:
        yield
    finally:
        threading.excepthook = before


def _is_ours(stack: TracebackType | None) -> bool:
    return any(_HERE in frame.f_code.co_filename for frame, _ in traceback.walk_tb(stack))
