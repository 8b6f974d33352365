"""Transport of batches from loader processes: through shared memory if it has room, else through the process's pipe.

A container has 64 MB of shared memory by default. Without room, torch loses the batch in a thread of the loader process, and
the rank would wait for it forever. So the room is compared with the need before the first batch, and a batch that still cannot
be sent is replaced by the reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import Dataset

from clae_dist.errors import DataError

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # batches that each loader process makes ahead
_AT_THE_RANK = 2  # batches in the step, and on the way to the device
_PAGES = 8 * 4096  # each tensor of a batch has a file of its own


def needed_bytes(batch_bytes: int, workers: int, local_size: int = 1) -> int:
    """Shared memory for the batches of `local_size` ranks with `workers` loader processes each."""
    return local_size * (workers * PREFETCH + _AT_THE_RANK) * (batch_bytes + _PAGES) if workers else 0


def free_bytes() -> int:
    """Free shared memory of this machine or container."""
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize


@lru_cache
def fits(needed: int) -> bool:
    """True if there was room for `needed` bytes at the first call: later, the batches themselves are there."""
    return not SHARED_MEMORY.is_dir() or needed <= free_bytes()


def advice(needed: int) -> Iterator[str]:
    """Advice for a faster transport if batches go through pipes."""
    if not fits(needed):
        yield (
            f"data: batches need {needed / 1e6:,.0f} MB of shared memory, and {SHARED_MEMORY} of {os.uname().nodename} has "
            f"{free_bytes() / 1e6:,.0f} MB free: they come through pipes, which is slower. For a container: docker run "
            f"--shm-size={-(-needed // 2**30)}g, or --ipc=host."
        )


class ThroughPipes(Dataset[Any]):
    """A dataset whose items (tuples with tensors) are packed so that they need no shared memory."""

    def __init__(self, items: Dataset[Any]) -> None:
        self._items = items

    def __getitem__(self, index: int) -> Any:
        return _Piped(self._items[index])


class _Piped:
    """A tuple that is pickled with the bytes of its tensors and unpickled to an equal tuple."""

    def __init__(self, item: tuple[Any, ...]) -> None:
        self._item = item

    def __reduce__(self) -> tuple[Any, ...]:
        parts = [_Packed(part) if isinstance(part, torch.Tensor) else part for part in self._item]
        return _rebuild, (type(self._item), parts)


class _Packed:
    """A tensor as an array, in its order in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        self._array = tensor.permute(self._order).numpy()

    def tensor(self) -> torch.Tensor:
        back = sorted(range(len(self._order)), key=self._order.__getitem__)
        return torch.from_numpy(self._array).permute(back)


def _rebuild(kind: type[tuple[Any, ...]], parts: Sequence[Any]) -> tuple[Any, ...]:
    whole = [part.tensor() if isinstance(part, _Packed) else part for part in parts]
    return kind(*whole) if hasattr(kind, "_fields") else kind(whole)


def report_lost_batches() -> None:
    """Queue of a loader process: a batch that cannot be sent is replaced by an error, which the rank raises in its turn.

    Python's own queue prints the error in this process and forgets the batch.
    """
    Queue._on_queue_feeder_error = _send_reason  # type: ignore[attr-defined]


def _send_reason(queue: Any, error: Exception, item: tuple[Any, Any]) -> None:
    way_out = "data.workers=0 loads in the ranks themselves."
    if "shared memory" in str(error) or "No space left" in str(error):
        way_out = (
            f"{SHARED_MEMORY} has {free_bytes() / 1e6:,.0f} MB free: docker run --shm-size=… gives a container more, "
            "and fewer data.workers need less."
        )
    reason = DataError(f"a loader process cannot hand over its batch ({' '.join(str(error).split())}); {way_out}")
    queue.put((item[0], ExceptionWrapper((DataError, reason, None), where="in a loader process")))
