"""A rank that is gone ends the others, whatever they are doing."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from clae_dist.errors import FAILED
from clae_dist.launchers import local
from clae_dist.launchers.rank import Ending


def _waits_for_the_one_that_is_killed() -> Ending:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()
    raise AssertionError


@pytest.mark.timeout(120)
def test_ranks_that_wait_for_a_killed_one_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_GRACE_S", 0.5)
    assert local.spawn(2, _waits_for_the_one_that_is_killed) == Ending(FAILED, "rank 1 of 2 was killed by SIGKILL.", again=True)
