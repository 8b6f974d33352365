"""Work of very different lengths on every rank, without a rank that waits in a collective for longer than it may."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from clae_dist.world import World

Result = TypeVar("Result")
_ASK_EVERY_S = 2.0


def together(world: World, work: Callable[[], Result], waiting: Callable[[], None]) -> Result:
    """work() on every rank, its own result on each, once all are done; what it raises is raised here, on that rank alone.

    Ranks that are done ask again and again whether the others are: a fetch may take hours, a collective may not.
    `waiting` is called each time.
    """
    if world.group is None:
        return work()
    thread = ThreadPoolExecutor(1)
    try:
        future: Future[Result] = thread.submit(work)
        busy = True
        while busy:
            wait([future], timeout=_ASK_EVERY_S)
            (busy,) = world.flags_anywhere(not future.done())
            waiting()
        return future.result()
    finally:
        thread.shutdown(wait=False)  # when a rank is lost, the others need not wait for what they fetch
