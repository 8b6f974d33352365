"""Causes of the end of a run: the class of an error, and a digest by which two crashes are known to be the same.

Errors of torch are recognised by the names of their classes and by their texts, so that nothing slow is imported.
"""

from __future__ import annotations

import errno
import hashlib
import re
import traceback
from collections.abc import Iterator
from pathlib import PurePath

from clae_dist.errors import MEMORY, NETWORK, STORAGE, UNEXPECTED, Cause, ClaeError
from clae_dist.storage import storage_error

_EXIT_CODES: dict[Cause, int] = {"memory": MEMORY, "network": NETWORK, "storage": STORAGE}
_NETWORK_NUMBERS = {
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.ENOTCONN),
    *(errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET),
}
# In this order: NCCL reports a GPU without memory as an error of its own, and a broken link as "unhandled system error".
_TEXTS: tuple[tuple[Cause, str], ...] = (
    (
        "memory",
        r"out of memory|can.?t allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED|"
        r"insufficient shared memory|killed by signal: (Killed|Bus error)",
    ),
    ("host", r"uncorrectable|\bECC\b|GPU is lost|fallen off the bus|no CUDA-capable device|hardware stack error|NVLink"),
    ("code", r"CUDA error|device-side assert|illegal memory access|NCCL error: (invalid usage|invalid argument)"),
)
_NETWORK_TEXT = re.compile(
    r"connection (closed|reset|refused|aborted|timed out)|(closed|reset) by peer|broken pipe|no route to host|"
    r"network is unreachable|host is unreachable|socket timeout|(read|write|connect\w*) time(d )?out|timed out waiting|"
    r"gloo.*(timed out|timeout)|NCCL|remote process exited|failed to (connect|recv)",
    re.IGNORECASE,
)
_NETWORK_CLASSES = frozenset(("DistNetworkError", "DistStoreError", "DistBackendError"))
_MEMORY_CLASSES = frozenset(("OutOfMemoryError", "MemoryError"))
PEER_LEFT = re.compile(r"(closed|reset) by (remote )?peer|remote process exited", re.IGNORECASE)
PEER_ADDRESS = re.compile(r"\[([^]\s]+)\]:\d+|by remote peer (?P<nccl>[^<\s]+)<", re.IGNORECASE)


def cause_of(error: BaseException) -> Cause:
    """The cause of an end by `error`: of the first error in its chain of explicit causes that is more than a fault in code."""
    return next((cause for one in _chain(error) if (cause := _cause(one)) != "code"), "code")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        yield one
        one = one.__cause__


def _cause(error: BaseException) -> Cause:
    if isinstance(error, ClaeError):
        return error.cause
    if storage_error(error):
        return "storage"
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _MEMORY_CLASSES or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "memory"
    if isinstance(error, ConnectionError | TimeoutError):
        return "network"
    if isinstance(error, OSError):
        return "network" if error.errno in _NETWORK_NUMBERS else "code"
    if not isinstance(error, RuntimeError):
        return "code"
    text = str(error)
    for cause, pattern in _TEXTS:
        if re.search(pattern, text, re.IGNORECASE):
            return cause
    return "network" if names & _NETWORK_CLASSES or _NETWORK_TEXT.search(text) else "code"


def exit_code_of(cause: Cause) -> int:
    """The exit code of a run that ends by this cause on one rank alone, where no restart is left."""
    return _EXIT_CODES.get(cause, UNEXPECTED)


def digest_of(error: BaseException) -> str:
    """A digest of the classes of an error and its causes, and of the lines of code that raised them; not of the messages."""
    parts: list[str] = []
    for one in _chain(error):
        parts.append(f"{type(one).__module__}.{type(one).__qualname__}")
        for frame in traceback.extract_tb(one.__traceback__):
            parts.append(f"{'/'.join(PurePath(frame.filename).parts[-2:])}:{frame.lineno}:{frame.name}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
