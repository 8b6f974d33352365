"""Exit codes of `clae` and of its ranks, and the one rule by which every launcher starts ranks again or does not.

Errors that all ranks raise together (settings, data, a non-finite loss, a checkpoint that cannot be written) would be raised
again, and a request to stop is no failure: the run ends. An error of one rank alone (CUDA, NCCL, its disk, a fault of the
program), a hang, or a signal that kills a rank may not come again: all ranks are started again, as often as the launcher
allows.
"""

from __future__ import annotations

from clae_dist.storage import EXIT_CODE as STORAGE

OK, UNEXPECTED, BAD_CONFIG, BAD_DATA, FAILED = range(5)
HUNG, STOPPED = 6, 75  # 75 is EX_TEMPFAIL: the same command resumes

_TOGETHER = (OK, BAD_CONFIG, BAD_DATA, FAILED, STORAGE, STOPPED)


def starts_again(code: int) -> bool:
    """Whether a rank that ended with this code is to be started again. A signal's code is negative."""
    return code not in _TOGETHER
