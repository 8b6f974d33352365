"""Where the time of a run went: shares add up to the wall time whatever killed it; what was done again is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clae_dist.runs.folder import RunFolder
from clae_dist.runs.goodput import KINDS, Goodput, Ledger, account, read_lines


class Time:
    """A clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def steps(ledger: Ledger, time: Time, first: int, last: int, each_s: float = 10.0) -> None:
    for step in range(first, last):
        ledger.switch("data", step)
        time.passes(1)
        ledger.switch("training", step)
        time.passes(each_s - 1)
    ledger.switch("training", last)


def start(folder: Path, time: Time, step: int) -> Ledger:
    ledger = Ledger(folder, time)
    time.passes(5)
    ledger.resumed(step)
    return ledger


def checkpoint(ledger: Ledger, time: Time, step: int, seconds: float = 2.0) -> None:
    ledger.switch("checkpoint", step)
    time.passes(seconds)


def killed_and_resumed(folder: Path) -> tuple[Goodput, Time]:
    """Ten steps, killed five after a checkpoint; after 100 s it resumes from there, to the end."""
    time = Time()
    first = start(folder, time, 0)
    steps(first, time, 0, 5)
    checkpoint(first, time, 5)
    steps(first, time, 5, 10)
    first.switch("evaluation", 10)
    time.passes(40)
    first.switch("training", 10)  # more than 30 s after the last line: one is written here
    time.passes(7)  # which nobody writes down: kill -9
    time.passes(100)
    second = start(folder, time, 5)
    steps(second, time, 5, 12)
    checkpoint(second, time, 12)
    second.close()
    return second.so_far(), time


def test_a_run_that_was_killed_accounts_for_all_of_its_time(tmp_path: Path) -> None:
    found, time = killed_and_resumed(tmp_path)
    assert found.wall_s == pytest.approx(time.now - 1000)
    assert sum(found.shares.values()) == pytest.approx(100)
    assert found.starts == 2
    assert found.spent == pytest.approx(
        {
            "starting": 10,
            "training": 12 * 9,
            "data": 12,
            "checkpoint": 4,
            "evaluation": 0,
            "lost": 5 * 10 + 40,  # and the evaluation, which is done again
            "idle": 107,
        }
    )
    again = account(read_lines(tmp_path))  # what the report reads is what the run said
    assert again.spent == pytest.approx(found.spent)


@pytest.mark.parametrize("cut", range(1, 120, 7))
def test_a_line_that_a_kill_cut_off_costs_no_other(tmp_path: Path, cut: int) -> None:
    killed_and_resumed(tmp_path)
    path = RunFolder(tmp_path).goodput_file
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    time = Time()
    time.now = 2000.0
    third = start(tmp_path, time, 12)
    third.close()
    found = account(read_lines(tmp_path))
    assert found.starts == 3
    assert found.wall_s == pytest.approx(time.now - 1000)
    assert found.spent == pytest.approx(third.so_far().spent)


def test_a_start_that_lost_everything(tmp_path: Path) -> None:
    """Without a checkpoint all steps are done again; starting was not in vain, it only starts again."""
    time = Time()
    steps(start(tmp_path, time, 0), time, 0, 20)
    found = start(tmp_path, time, 0).so_far()
    assert found.spent["training"] == 0
    assert found.spent["lost"] + found.spent["idle"] == pytest.approx(200)
    assert found.spent["lost"] >= 160  # a line at least every 30 s
    assert found.spent["starting"] == 10


def test_a_checkpoint_whose_line_is_missing_cuts_by_steps(tmp_path: Path) -> None:
    spent = {"starting": 5.0, "training": 100.0}
    lines = [
        {"event": "start", "at": 0.0},
        {"event": "resume", "at": 5.0, "step": 0, "spent": {"starting": 5.0}},
        {"event": "mark", "at": 105.0, "step": 10, "spent": spent},
        {"event": "start", "at": 105.0},
        {"event": "resume", "at": 110.0, "step": 4, "spent": {"starting": 5.0}},
    ]
    found = account(lines)
    assert found.spent["lost"] == pytest.approx(60)
    assert found.spent["training"] == pytest.approx(40)


def test_a_wait_for_a_rank_that_waited_for_data_is_one(tmp_path: Path) -> None:
    time = Time()
    ledger = start(tmp_path, time, 0)
    steps(ledger, time, 0, 10)
    ledger.move("training", "data", 30)
    ledger.move("training", "data", -5)
    found = ledger.so_far()
    assert (found.spent["training"], found.spent["data"]) == (60, 40)
    assert found.metrics().keys() == {"goodput", *(f"goodput_{kind}_share" for kind in KINDS if kind != "training")}
    assert found.describe() == "goodput 57.1 % of 105 s in 1 start (starting 4.8 %, data 38.1 %)"


def test_a_clock_that_is_set_back_makes_nothing_negative(tmp_path: Path) -> None:
    time = Time()
    ledger = start(tmp_path, time, 0)
    time.passes(-500)
    ledger.switch("training", 0)
    assert min(ledger.so_far().spent.values()) == 0
    json.loads((RunFolder(tmp_path).goodput_file).read_text().splitlines()[-1])


def test_what_an_older_start_did_is_cut_by_every_later_one(tmp_path: Path) -> None:
    """Up to step 10, again from 8, again from 4 (the checkpoint of 8 was damaged): the first start's steps 5 to 10 are lost."""
    time = Time()
    first = start(tmp_path, time, 0)
    for step in (4, 8):
        steps(first, time, step - 4, step)
        checkpoint(first, time, step, 0.0)
    steps(first, time, 8, 10)
    first.close()
    second = start(tmp_path, time, 8)
    steps(second, time, 8, 10)
    second.close()
    third = start(tmp_path, time, 4)
    steps(third, time, 4, 12)
    third.close()
    found = account(read_lines(tmp_path))
    assert found.starts == 3
    assert found.spent["lost"] == pytest.approx(10 * (4 + 2 + 2))  # 4 to 8 and 8 to 10 of the first, 8 to 10 of the second
    assert found.spent["training"] + found.spent["data"] == pytest.approx(10 * 12)
