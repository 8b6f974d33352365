"""The line that names the rank which is the cause, from what ranks say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from clae_dist.config import Guard
from clae_dist.training.hang_report import Report, stacks_by_ranks, verdict

HOSTS = ["a (process 1)", "a (process 2)", "b (process 1)", "b (process 2)"]


def report(rank: int, doing: str = "training", where: str = "flags_anywhere (world.py:1)") -> Report:
    return Report(rank, HOSTS[rank], doing, 7, 300.0 + rank, where, f"stack of {where}\n")


@pytest.mark.parametrize(
    ("reports", "cause"),
    [
        ([report(0), report(1), report(3)], "rank 2 on b (process 1) does not answer: stopped, killed or cut off"),
        ([report(0)], "rank 1 on a (process 2), rank 2 on b (process 1), rank 3 on b (process 2) do not answer"),
        ([report(0), report(1, "data"), report(2), report(3)], "rank 1 on a (process 2) waits for data, which the loader"),
        ([report(rank, "data") for rank in range(4)], "all ranks wait for data, rank 0 on a (process 1) among them"),
        (
            [report(0), report(1), report(2, where="mean (world.py:9)"), report(3)],
            "rank 2 on b (process 1) is at training in mean (world.py:9), where no other rank comes; rank 0 on a",
        ),
        (
            [report(rank) for rank in range(4)],
            "all 4 ranks wait at training in flags_anywhere (world.py:1), such as rank 0 on a",
        ),
    ],
)
def test_the_line_names_rank_host_and_what_it_does(reports: list[Report], cause: str) -> None:
    line = verdict(reports, 4, HOSTS, Path("runs/x"))
    assert line.startswith(f"no progress for 300 s after step 7: {cause}")
    assert line.endswith("Stacks of all ranks: runs/x/hang. The same command resumes from the newest checkpoint.")
    assert "\n" not in line


def test_a_rank_that_never_met_the_others_has_no_host() -> None:
    assert "rank 1 on a host that never answered does not" in verdict([report(0)], 2, [], Path("x"))


def test_of_two_ranks_it_is_not_rank_0_that_is_blamed() -> None:
    line = verdict([report(0), report(1, where="mean (world.py:9)")], 2, HOSTS, Path("x"))
    assert "rank 1 on a (process 2) is at training in mean (world.py:9), where no other rank comes; rank 0" in line


def test_equal_stacks_are_written_once() -> None:
    text = stacks_by_ranks([report(0), report(2), report(1, where="mean (world.py:9)")])
    assert text.count("stack of flags_anywhere") == 1
    assert "rank 0 on a (process 1), rank 2 on b (process 1): training, after step 7" in text


def test_collectives_wait_longer_than_the_watch() -> None:
    """The group's own timeout would end ranks before they can say which of them hangs."""
    for hang_s in (0.0, 1.0, 300.0, 3000.0):
        guard = Guard(hang_s=hang_s)
        assert guard.timeout_s > guard.limit_s(patient=True)
