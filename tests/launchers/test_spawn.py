"""Ranks of this machine, as processes: how they end."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from clae_dist.errors import FAILED, OK
from clae_dist.launchers.local import spawn
from clae_dist.launchers.rank import Ending
from clae_dist.world import connect


class _DiesWithPython:
    """What a thread of gloo does that drops its last tensor while Python ends, now and then."""

    def __del__(self, ends: Callable[[], bool] = sys.is_finalizing, abort: Callable[[], None] = os.abort) -> None:
        if ends():
            abort()


_KEPT: list[_DiesWithPython] = []


def _leaves_a_thread(folder: Path) -> Ending:
    with connect() as world:
        ranks = world.gather_objects(world.rank)
    _KEPT.append(_DiesWithPython())
    atexit.register((folder / str(world.rank)).write_text, "registered for the end")
    return Ending(OK, str(ranks))


def _is_killed() -> Ending:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return Ending(OK, "")


def test_a_rank_that_has_finished_is_not_aborted_by_the_end_of_python(tmp_path: Path) -> None:
    assert spawn(2, _leaves_a_thread, tmp_path) == Ending(OK, "[0, 1]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_killed_rank_is_named_with_what_the_caller_advises() -> None:
    assert spawn(2, _is_killed) == Ending(FAILED, "rank 1 of 2 was killed by SIGKILL.", again=True)
    assert spawn(2, _is_killed, advice="Do this.") == Ending(FAILED, "rank 1 of 2 was killed by SIGKILL. Do this.", again=True)
