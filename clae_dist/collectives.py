"""torch's collectives on one tensor a rank, under the names that this torch has: newer ones warn of those before 2.14.

`waiting` marks the places where a rank may wait for another: collectives, and the end of a backward whose gradients are still
being reduced. A clock that observes them knows a rank's own time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist


def all_gather(everyone: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Fill `everyone` (W·B, …) with the contiguous `own` (B, …) of all W ranks, in the order of ranks. Collective."""
    with waiting():
        _all_gather(everyone, own, group=group)


def reduce_scatter(own: torch.Tensor, everyone: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Fill `own` (B, …) with this rank's part of the sum over ranks of the contiguous `everyone` (W·B, …). Collective."""
    with waiting():
        _reduce_scatter(own, everyone, group=group)


def all_gather_begun(everyone: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """`all_gather` that only begins; `everyone` is filled when the work returned has been waited for."""
    work: dist.Work = _all_gather(everyone, own, group=group, async_op=True)
    return work


_observer: Callable[[], AbstractContextManager[None]] = nullcontext


def waiting() -> AbstractContextManager[None]:
    """Context in which this rank may wait for others."""
    return _observer()


@contextmanager
def observed(by: Callable[[], AbstractContextManager[None]], *, every_work: bool = False) -> Iterator[None]:
    """Inside, every `waiting` is a context that `by` returns.

    `every_work`: so is every wait for a collective that other packages have begun, as fully_shard and DeepSpeed do within
    forward and backward. Where the host itself waits, as on a CPU.
    """
    global _observer
    before, _observer = _observer, by
    wait = dist.Work.wait
    if every_work:
        dist.Work.wait = _marked(wait)  # type: ignore[method-assign]
    try:
        yield
    finally:
        _observer = before
        dist.Work.wait = wait  # type: ignore[method-assign]


MARK = "wait_marked"  # name of the function around every wait, which says nothing of where a rank waits


def _marked(wait: Callable[..., bool]) -> Callable[..., bool]:
    main_thread = threading.get_ident()

    def wait_marked(work: dist.Work, *arguments: Any) -> bool:
        if threading.get_ident() != main_thread:
            return wait(work, *arguments)
        with waiting():
            return wait(work, *arguments)

    assert wait_marked.__name__ == MARK
    return wait_marked


def _named(new: str, old: str) -> Any:
    return getattr(dist, new) if hasattr(dist, new) else getattr(dist, old)


_all_gather = _named("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")
