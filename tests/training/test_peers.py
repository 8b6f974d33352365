"""A rank that gives no answer is named by all within guard.lost_s; one that has ended is not missed."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from clae_dist.bench.measure import replaced
from clae_dist.config import Config, Guard, Launch
from clae_dist.errors import HUNG
from clae_dist.runs.ends import read_ends
from clae_dist.training import peers
from clae_dist.training.peers import Peers
from clae_dist.training.session import Session
from clae_dist.world import World
from tests.ranks import RankPool

LOST_S = 2.0


def run(world: World, folder: Path, launcher: Any, broken: int, how: str) -> str:
    """The line with which this rank leaves; "" if it does not within three times guard.lost_s."""
    left, lines = threading.Event(), []

    def abandon(code: int) -> None:
        assert code == HUNG
        left.set()

    real_leave, real_read = Peers._leave, peers._Beats._read

    def leave(self: Peers, what: str, aloud: bool, lost: int | None = None) -> None:
        lines.append(what)
        real_leave(self, what, aloud, lost)
        self._over.set()

    def read(self: peers._Beats) -> tuple[str, list[int]]:
        if how == "cut off":
            raise dist.DistNetworkError("no route to host")
        return real_read(self)

    config = Config(run_dir=str(folder), launch=Launch(launcher=launcher), guard=Guard(lost_s=LOST_S))
    with ExitStack() as stack:
        stack.enter_context(replaced(peers, abandon=abandon))
        stack.enter_context(replaced(Peers, _leave=leave))
        with Peers(Session(config, world, lambda _: None)):
            world.gather_objects(0)  # all have begun
            if world.rank == broken:
                if how == "ended":
                    return ""
                if how == "silent":
                    stack.enter_context(replaced(peers._Beats, send=lambda self, number: None))
                stack.enter_context(replaced(peers._Beats, _read=read))
            left.wait(3 * LOST_S)
        return lines[0] if lines else ""


def results(ranks: RankPool, tmp_path: Path, broken: int, how: str, launcher: str = "torchrun") -> list[str]:
    lines: list[str] = ranks.run(3, run, tmp_path, launcher, broken, how)
    return lines


@pytest.mark.parametrize("broken", [0, 1])
def test_a_silent_rank_is_named_by_all_others(ranks: RankPool, tmp_path: Path, broken: int) -> None:
    lines = results(ranks, tmp_path, broken, "silent")
    (end,) = read_ends(tmp_path)
    assert (end.cause, end.rank, end.host) == ("host", broken, os.uname().nodename)
    for rank in {0, 1, 2} - {broken}:
        assert f"no answer for {LOST_S:g} s from rank {broken} on " in lines[rank]
        assert "process" in lines[rank]


def test_a_rank_that_is_cut_off_leaves_by_itself(ranks: RankPool, tmp_path: Path) -> None:
    lines = results(ranks, tmp_path, 2, "cut off")
    assert "from the store of the run, which rank 0" in lines[2]
    assert not lines[0]
    assert not lines[1]


@pytest.mark.parametrize(
    ("broken", "how", "launcher"),
    [
        (0, "ended", "torchrun"),
        pytest.param(2, "ended", "ray", marks=pytest.mark.slow),
        pytest.param(1, "silent", "local", marks=pytest.mark.slow),
    ],
)
def test_no_rank_is_missed_that_has_ended_or_that_a_launcher_watches(
    ranks: RankPool, tmp_path: Path, broken: int, how: str, launcher: str
) -> None:
    assert results(ranks, tmp_path, broken, how, launcher) == ["", "", ""]
