"""Work of very different duration on every rank, without exceeding the timeout of a collective."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from clae_dist.world import World

Result = TypeVar("Result")
_ASK_EVERY_S = 2.0


def together(world: World, work: Callable[[], Result], waiting: Callable[[], None]) -> Result:
    """Run work() on every rank; return its own result once all are done. Errors are raised on that rank alone. Collective.

    Ranks that are done poll the others: a fetch may take hours, a collective may not. `waiting` is called at each poll.
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
        thread.shutdown(wait=False)  # if a rank is lost, the others do not wait for their fetches
