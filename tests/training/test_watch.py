"""The watch and time: a machine that slept has not hung."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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
