"""Exit codes of every command and rank, and the exceptions that carry them.

An error that all ranks raise together (settings, data, a non-finite loss, a checkpoint that cannot be written) would be raised
again by a restart, and a request to stop is not a failure: the run ends. An error of one rank alone (CUDA, NCCL, its disk, a
bug), a hang, or a signal that kills a rank may not happen again: all ranks are restarted, as often as the launcher allows.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

OK, UNEXPECTED, BAD_CONFIG, BAD_DATA, FAILED, STORAGE, HUNG, MEMORY, NETWORK = range(9)
STOPPED = 75  # EX_TEMPFAIL: the same command resumes
INTERRUPTED = 130

EXIT_CODES = {
    OK: "success",
    UNEXPECTED: "unexpected error; parity, replay, verify, doctor and checkpoints: a difference or a problem was found; "
    "promote: a rule of the gate is broken",
    BAD_CONFIG: "a setting or an argument cannot be used",
    BAD_DATA: "the data cannot be used; monitor: an alarm",
    FAILED: "a rank failed",
    STORAGE: "storage failed (full, read-only, damaged)",
    HUNG: "a rank hung and the run was not restarted",
    MEMORY: "a rank ran out of memory, and restarts are used up or would not help",
    NETWORK: "the network between ranks failed, and restarts are used up",
    STOPPED: "stopped on request with everything saved; the same command resumes",
    INTERRUPTED: "interrupted by Ctrl-C",
}

Cause = Literal[
    "finished",
    "stopped",
    "preemption",
    "configuration",
    "data",
    "storage",
    "memory",
    "network",
    "host",
    "no progress",
    "code",
]
CAUSES: tuple[Cause, ...] = get_args(Cause)  # of the end of a start (causes.py)

# `python -m data_prep` has the same codes for success, storage and Ctrl-C, and these for results of its own.
DIFFERENCES, BAD_INPUT, LEAKAGE = 1, 2, 3

_ENDS_THE_RUN = (OK, BAD_CONFIG, BAD_DATA, FAILED, STORAGE, STOPPED)


class ClaeError(Exception):
    """An error that a user can fix. The message states the fact, the value and the way out in one line."""

    exit_code: ClassVar[int] = UNEXPECTED
    cause: ClassVar[Cause] = "code"
    on_all_ranks: ClassVar[bool] = True  # every rank raises it, so that no rank waits for another


class ConfigError(ClaeError, ValueError):
    """A setting or an argument cannot be used."""

    exit_code = BAD_CONFIG
    cause = "configuration"


class DataError(ClaeError, ValueError):
    """A data set cannot be used."""

    exit_code = BAD_DATA
    cause = "data"


class RankError(ClaeError, RuntimeError):
    """A rank failed; every rank raises this error and names the ranks that failed."""

    exit_code = FAILED


class DivergedError(RankError):
    """The loss or the gradient is non-finite."""

    cause = "configuration"


class CheckpointError(ClaeError, RuntimeError):
    """A checkpoint cannot be written or read."""

    exit_code = STORAGE
    cause = "storage"


class DamagedError(ClaeError, ValueError):
    """A file of a checkpoint is damaged."""

    exit_code = STORAGE
    cause = "storage"
    on_all_ranks = False


def exit_code(error: BaseException) -> int:
    """The exit code of an error; UNEXPECTED for an error that is not the user's to fix."""
    return error.exit_code if isinstance(error, ClaeError) else UNEXPECTED


def restarts(code: int) -> bool:
    """True if ranks are restarted after a rank that exited with `code`. The code of a signal is negative."""
    return code not in _ENDS_THE_RUN


def exit_codes_help() -> str:
    """The table of exit codes as the end of every command's help text."""
    return "exit codes:\n" + "\n".join(f"  {code:3}  {meaning}" for code, meaning in EXIT_CODES.items()) + "\n"
