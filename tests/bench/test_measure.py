"""The harness: what is compared must be equal, and every bench has rows of one shape."""

from __future__ import annotations

import json
import time

import pytest
import torch

from clae_dist.bench.contrast import compare
from clae_dist.bench.measure import (
    Row,
    Times,
    UnequalError,
    added_bytes,
    assert_equal,
    replaced,
    time_in_turns,
    with_ratios,
)
from clae_dist.bench.outcome import Outcome, amount, seconds

CPU = torch.device("cpu")


def test_a_difference_above_the_tolerance_is_refused_by_name() -> None:
    right = torch.tensor([1.0, 2.0])
    assert assert_equal("case", "same", [right], [right.double()], 0.0) == 0
    assert assert_equal("case", "near", [right * (1 + 1e-6)], [right], 1e-5) > 0
    for wrong in (right * 1.01, right * float("nan"), right.flip(0)):
        with pytest.raises(UnequalError, match="case: rival differs from the reference"):
            assert_equal("case", "rival", [wrong], [right], 1e-5)


def test_turns_are_taken_and_the_first_call_is_not_counted() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = time_in_turns(runs, CPU, repeats=2, at_least_s=0.0)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert [len(times[name].wall) for name in "ab"] == [2, 2]


def test_short_calls_are_repeated_until_the_clock_can_tell() -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1
        time.sleep(1e-3)

    times = time_in_turns({"short": run}, CPU, repeats=1, at_least_s=0.01)
    assert calls > 3
    assert times["short"].median_s >= 1e-3


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert Times([1.0, 2.0, 3.0, 4.0, 5.0], []).spread == pytest.approx((4 - 2) / 3)
    assert Times([1.0], []).spread == 0


def test_added_bytes_are_those_of_the_call_at_its_peak() -> None:
    """A peak of an earlier, larger call was counted once."""
    large, small = 64 << 20, 16 << 20
    for wanted in (large, small):
        found = added_bytes(lambda wanted=wanted: torch.ones(wanted // 4).sum(), CPU)
        if found is not None:  # this system does not tell
            assert wanted * 0.9 < found < wanted * 1.5 + (4 << 20)


def test_ratios_are_to_every_other_row_of_the_case() -> None:
    one = Row("c", "one: x", 1.0, 0.0, wire_bytes=10)
    two = Row("c", "two: y", 4.0, 0.0, wire_bytes=40)
    first, second = with_ratios([one, two])
    assert (first.ratio_to, first.bytes_ratio_to) == ({"two": 0.25}, {"two": 0.25})
    assert (second.ratio_to, second.bytes_ratio_to) == ({"one": 4.0}, {"one": 4.0})


def test_outcome_is_json_of_one_shape_and_a_table() -> None:
    rows = compare("the case", {name: ("sums", lambda: torch.ones(9).sum()) for name in "ab"}, CPU, 2, lambda: None)
    outcome = Outcome(rows, CPU, ["a note"])
    found = json.loads(outcome.as_json())
    assert set(found) == {"versions", "machine", "notes", "rows"}
    assert {"python", "torch", "clae-dist"} <= set(found["versions"])
    assert {"cpu", "cores", "threads"} <= set(found["machine"])
    assert [set(row["ratio_to"]) for row in found["rows"]] == [{"b"}, {"a"}]
    assert all(row["floor_s"] is not None and row["more"]["cpu_s"] >= 0 for row in found["rows"])
    for text in ("the case", "a note", "torch", "of b"):
        assert text in outcome.as_table()


def test_units() -> None:
    assert [seconds(value) for value in (2.5, 0.0025, 2.5e-6)] == ["2.5 s", "2.5 ms", "2.5 µs"]
    assert [amount(value) for value in (3 << 30, 3 << 20, 1536, 9)] == ["3 GiB", "3 MiB", "1.5 KiB", "9 B"]


def _fail_without(module: object) -> None:
    with replaced(module, dumps=None):
        assert json.dumps is None
        raise ZeroDivisionError


def test_what_was_replaced_comes_back() -> None:
    before = json.dumps
    with pytest.raises(ZeroDivisionError):
        _fail_without(json)
    assert json.dumps is before
