"""Processes that end with the process that started them, in whatever way that one dies (Linux).

The kernel does it (PR_SET_PDEATHSIG), so kill -9 and a child that is stopped are no exceptions. `python -m clae_dist.lifetime
PARENT COMMAND …` becomes COMMAND, which then ends with the process PARENT.
"""

from __future__ import annotations

import ast
import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ORPHANED = 1  # exit code of a process whose parent had died before
_dedicated = False
_has_forked = False


def dedicate_process() -> None:
    """Declare that this process does nothing but one command: no program of a user shares it, so it may be forked."""
    global _dedicated
    _dedicated = True


def has_forked() -> bool:
    """True in a process that shares its memory with a fork server (`fork_server_from_here`).

    Taking down its interpreter would write to every object, and so copy what is shared.
    """
    return _has_forked


def name_process(name: str) -> None:
    """Set the name that `ps` and `top` show for this process (at most 15 characters); forked processes inherit it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def end(code: int) -> NoReturn:
    """End this process with `code`, also after an interrupt that was handled.

    Python remembers a KeyboardInterrupt that comes out of an exec() of text, as in `dataclass` while a module is imported, and
    then ends by SIGINT whatever the code is; the next exec() of text makes it forget.
    """
    exec("")
    sys.exit(code)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process (SIGKILL) when its parent dies; leave at once if the parent is no longer `parent`.

    The kernel counts the end of the thread that started this process as the parent's end. Children are not covered: each has
    to call this for itself. Without Linux nothing happens.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(ORPHANED)


def fork_server(preload: str) -> ForkServerContext:
    """Return the context of a fork server of this process that has imported `preload`.

    multiprocessing itself keeps one server, with the imports of its first user. A server with other imports ends with the
    processes that it has forked.
    """
    from multiprocessing import forkserver, get_context

    modules = ["clae_dist.fork_server", preload]
    server: Any = forkserver._forkserver
    if server._preload_modules != modules:
        if server._forkserver_pid is not None:  # else its entry in the table of processes would stay
            threading.Thread(target=os.waitpid, args=(server._forkserver_pid, 0), daemon=True).start()
        _let_go(server)
    context = get_context("forkserver")
    context.set_forkserver_preload(modules)
    return context


def fork_server_from_here(preload: str) -> bool:
    """Start the fork server as a fork of this process, with which it then shares the memory of torch and all other imports.

    Call it after the imports, and before any process group, CUDA context or parallel computation. Returns False without
    doing anything where a fork is unsafe: in a process that is not dedicated (a notebook's), or has threads or a CUDA context.
    `fork_server` starts a new interpreter there when it is needed.
    """
    global _has_forked
    from multiprocessing import forkserver, resource_tracker, util

    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_initialized()
    if sys.platform != "linux" or not _dedicated or threading.active_count() > 1 or cuda:
        return False
    fork_server(preload)
    resource_tracker.ensure_running()  # otherwise it would be forked, too
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()  # or the server would print what is buffered once more
    gc.freeze()  # the garbage collector would write to these objects, and so copy their pages
    module: Any = util
    start_interpreter = module.spawnv_passfds
    module.spawnv_passfds = _fork
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # for good in the server; begin_forked_process unblocks them
    try:
        forkserver.ensure_running()
    finally:
        module.spawnv_passfds = start_interpreter
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _has_forked = True
    return True


def _fork(path: bytes, arguments: Sequence[str], descriptors: Sequence[int]) -> int:
    """Fork and run the code that multiprocessing would give to a new interpreter (`arguments` ends with `-c CODE`)."""
    process = os.fork()
    if process == 0:
        _serve(arguments[-1], frozenset(descriptors))
    return process


def _serve(code: str, descriptors: frozenset[int]) -> NoReturn:
    """Be a fork server, with the open files and modules that a new interpreter would have."""
    from multiprocessing import forkserver

    try:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        for opened in map(int, os.listdir("/proc/self/fd")):
            if opened > 2 and opened not in descriptors:
                os.closerange(opened, opened + 1)  # the one of the listing is closed already, which closerange ignores
        sys.modules.pop("clae_dist.fork_server", None)  # of the server that this process was forked from
        call = ast.parse(code).body[-1].value  # type: ignore[attr-defined]  # main(…) of multiprocessing.forkserver
        forkserver.main(*map(ast.literal_eval, call.args), **ast.literal_eval(call.keywords[0].value))
    finally:
        os._exit(0)


def _let_go(server: Any) -> None:
    """The process that needs a fork server next starts its own."""
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
    server.__init__()


def begin_forked_process() -> None:
    """Tie a child of a fork server to the process that asked for it, in whatever way that one dies.

    Its death kills the server (fork_server.py), whose death kills the child. multiprocessing would have the child use the same
    server for processes of its own; those have to end with the child, so it gets another server when it needs one. Signals
    that the server keeps pending are delivered from here on.
    """
    from multiprocessing import forkserver, parent_process

    from clae_dist.fork_server import PID  # imported by the server; imported here it would tie this process to its parent

    end_with_parent(PID)
    owner = parent_process()
    if owner is not None and not owner.is_alive():  # it died before its server had asked the kernel
        os._exit(ORPHANED)
    _let_go(forkserver._forkserver)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def main(arguments: list[str]) -> NoReturn:
    """Replace this process by a command that ends with its parent. `arguments`: the parent's process id, then the command."""
    parent, *command = arguments
    end_with_parent(int(parent))
    os.execvp(command[0], command)


@contextmanager
def main_module_hidden() -> Iterator[None]:
    """Inside, new processes do not import the program that started this one: a script without `if __name__ == "__main__"`
    would run again in each of them."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


if __name__ == "__main__":
    main(sys.argv[1:])
