"""When it is time to save: by rank 0's clock, from one save to the next."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clae_dist.config import Checkpointing, Config
from clae_dist.runs.checkpoint import Piece
from clae_dist.runs.folder import RunFolder, step_of
from clae_dist.training import saving
from clae_dist.training.clock import Clock
from clae_dist.training.saving import Saving
from clae_dist.training.session import Session
from clae_dist.world import World

CPU = torch.device("cpu")


class OneTensor:
    """As much of a backend as a save asks for."""

    def average_local_statistics(self) -> None: ...

    def describe(self) -> str:
        return "ddp"

    def pieces(self) -> Iterator[Piece]:
        yield Piece("model/w", (3,), 0, torch.ones(3), (0,))


def test_every_minutes_counts_from_the_save_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is not set back saves at every step once the first ten minutes are over."""
    minutes = 100.0
    clock = SimpleNamespace(monotonic=lambda: 60 * minutes, perf_counter=time.perf_counter)
    monkeypatch.setattr(saving, "time", clock)
    config = Config(run_dir=str(tmp_path), checkpoint=Checkpointing(every_minutes=10))
    saves = Saving(Session(config, World.single("cpu"), pytest.fail), OneTensor(), Clock(CPU))  # type: ignore[arg-type]
    due = []
    for step in range(1, 26):
        minutes += 1
        if saves.flags()[0]:
            due.append(step)
            saves.save(step, {"images_seen": step})
            saves.settle()
    saves.close()
    assert due == [10, 20]
    assert [step_of(path) for path in RunFolder(tmp_path).find_checkpoints()] == [20, 10]


@pytest.mark.parametrize(
    ("every", "reserved"),
    [
        pytest.param({"every_steps": 4}, True, id="a save during training"),
        pytest.param({"every_steps": 5}, False, id="only the last step"),
        pytest.param({"every_steps": 0}, False, id="none"),
        pytest.param({"every_steps": 0, "every_minutes": 1.0}, True, id="at any time"),
    ],
)
def test_memory_is_reserved_only_for_a_save_during_training(tmp_path: Path, every: dict[str, Any], reserved: bool) -> None:
    """The last save waits for its end, so it needs no copy."""
    config = Config(run_dir=str(tmp_path), checkpoint=Checkpointing(**every))
    saves = Saving(Session(config, World.single("cpu"), pytest.fail), OneTensor(), Clock(CPU))  # type: ignore[arg-type]
    saves.reserve(1, 5)
    saves.save(5, {"images_seen": 5}, last=True)
    saves.settle()
    saves.close()
    assert (saves._writer._memory._bytes.numel() > 0) == reserved
    assert [step_of(path) for path in RunFolder(tmp_path).find_checkpoints()] == [5]
