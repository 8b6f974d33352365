"""Processes that end with the process that started them, in whatever way that one dies (Linux).

The kernel does it (PR_SET_PDEATHSIG), so kill -9 and a child that is stopped are no exceptions. `python -m clae_dist.lifetime
PARENT COMMAND …` becomes COMMAND, which then ends with the process PARENT.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
ORPHANED = 1  # exit code of a process whose parent had died before


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


def main(arguments: list[str]) -> NoReturn:
    """Replace this process by a command that ends with its parent. `arguments`: the parent's process id, then the command."""
    parent, *command = arguments
    end_with_parent(int(parent))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
