"""The server that loader processes are forked from: a fork of the rank itself where that is safe, and shares its imports."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from multiprocessing import forkserver as implementation
from multiprocessing import util
from multiprocessing.context import BaseContext
from typing import Any, NoReturn

_PRELOAD = ["clae_dist.fork_server", "clae_dist.data.preload"]


def forkserver() -> BaseContext:
    """The context of the fork server, which has no threads of gloo or torch (forking those may deadlock)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def fork_server_from_here() -> None:
    """Start the server as a fork of this process, which shares the memory of torch and all other imports (about 350 MB).

    Call it after the imports and before any process group, CUDA context or parallel computation. In a process with threads
    of Python nothing happens: multiprocessing then starts a new interpreter when the first loader is needed.
    """
    if sys.platform != "linux" or threading.active_count() > 1:
        return
    forkserver()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or each child would write what is buffered once more
    gc.freeze()  # the collector would write to these objects, and so copy their pages
    module: Any = util
    start_interpreter = module.spawnv_passfds
    module.spawnv_passfds = _fork
    try:
        implementation.ensure_running()
    finally:
        module.spawnv_passfds = start_interpreter


def _fork(path: bytes, arguments: Sequence[str], descriptors: Sequence[int]) -> int:
    """Fork and run the command that multiprocessing would give to a new interpreter (`arguments` ends with `-c COMMAND`)."""
    process = os.fork()
    if process == 0:
        _serve(arguments[-1], descriptors)
    return process


def _serve(command: str, descriptors: Sequence[int]) -> NoReturn:
    try:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # whatever replaced them may write to what is closed here
        for opened in os.listdir("/proc/self/fd"):  # as in a new interpreter; above all the pipe that tells of the rank's end
            if int(opened) > 2 and int(opened) not in descriptors:
                os.closerange(int(opened), int(opened) + 1)  # ignores the one of the listing, which is closed
        for name in _PRELOAD:  # of the server that this process may itself be a fork of
            sys.modules.pop(name, None)
        exec(command, {})
    finally:
        os._exit(0)
