"""A thread of a rank that fails ends the rank at once, and says why."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from clae_dist.config import Config
from clae_dist.errors import UNEXPECTED
from clae_dist.training.helper_threads import failing_threads_end_the_rank
from clae_dist.training.session import Session
from clae_dist.world import World
from tests.small_run import small_run


def run(config: Config, target: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which the thread ends the process."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with failing_threads_end_the_rank(Session(config, World.single("cpu"), print)):
        thread = threading.Thread(target=target, name="a helper", daemon=True)
        thread.start()
        thread.join()
    return codes


def test_a_thread_of_ours_that_fails_ends_the_rank_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a fetch ahead of need, say: from a bug, not from a server that is away."""
    from clae_dist.data.prefetch import Prefetch

    def needs() -> Any:
        raise KeyError("https://user:secret@host/a shard")
        yield

    prefetch = Prefetch.__new__(Prefetch)
    prefetch._needs, prefetch._ahead, prefetch._step, prefetch._waiting = needs(), 1, 0, []
    prefetch._stop, prefetch._moved = threading.Event(), threading.Condition()
    config = small_run("nowhere", tmp_path)
    assert run(config, prefetch._run, monkeypatch) == [UNEXPECTED]
    line = capsys.readouterr().err
    assert line.startswith("clae: rank 0 of 1: the thread a helper failed: KeyError: ")
    assert "secret" not in line
    assert (tmp_path / "console.log").read_text() == line
    log = (tmp_path / "error-rank-0.log").read_text()
    assert "in needs" in log
    assert "secret" not in log


def test_a_vendors_thread_that_fails_is_the_vendors_affair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    assert run(small_run("nowhere", tmp_path), lambda: time.sleep("long"), monkeypatch) == []
    assert [failure.exc_type for failure in seen] == [TypeError]
    assert threading.excepthook == seen.append
