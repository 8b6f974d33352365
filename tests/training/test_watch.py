"""The watch and time: a machine that slept has not hung."""

from __future__ import annotations

import sys
import threading
import time
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clae_dist import collectives
from clae_dist.config import Config, Guard
from clae_dist.training import watch
from clae_dist.training.guard import StopRequest
from clae_dist.training.session import Session
from clae_dist.training.watch import Watch
from clae_dist.world import World


def test_a_machine_that_slept_is_not_taken_for_a_rank_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop's lid, a suspended job: an hour passes between two looks of the watch, with no progress in it."""
    looks = 0
    enough = threading.Event()

    def monotonic() -> float:
        nonlocal looks
        looks += 1
        if looks > 6:
            enough.set()
        return time.monotonic() + (3600.0 if looks > 2 else 0.0)

    given_up: list[Any] = []
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=monotonic, time=time.time, sleep=time.sleep))
    monkeypatch.setattr(Watch, "_give_up", lambda self, *seen: given_up.append(seen))
    config = Config(run_dir=str(tmp_path), guard=Guard(hang_s=2.0))  # looks every 0.2 s; 8 s may pass while it starts
    with Watch(Session(config, World.single("cpu"), print), StopRequest(tmp_path)):
        assert enough.wait(60)
    assert not given_up


def test_a_marked_wait_is_placed_where_its_caller_is() -> None:
    """All ranks would seem to wait in the mark, and the one in a collective where no other comes would not be named."""
    found: list[str] = []

    def wait(work: object) -> bool:
        found.append(watch._own_place(sys._getframe()))
        return True

    # A function of the package that waits, with its file's name.
    caller: dict[str, Any] = {"marked": collectives._marked(wait)}
    code = compile("def flags_anywhere(): return marked(None)", f"{watch._HERE}world.py", "exec")
    caller["flags_anywhere"] = types.FunctionType(code.co_consts[0], caller)
    assert caller["flags_anywhere"]()
    assert found == ["flags_anywhere (world.py:1)"]
