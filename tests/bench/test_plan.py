from __future__ import annotations

from dataclasses import replace

import pytest

from clae_dist.bench import plan
from clae_dist.bench.measure import Row

TINY = replace(plan.QUICK, image_size=16, rows=8, repeats=1)


def row(time_error: float, memory_error: float) -> Row:
    return Row("case", "measured: a step", 1.0, 0.0, more={"time_error": time_error, "memory_error": memory_error})


def test_the_verdict_has_errors_of_either_sign() -> None:
    time, memory = plan.verdict([row(0.1, 0.0), row(-0.2, -0.16), row(0.05, 0.1)]).split("; ")
    assert time == "3 cases: error of time, median 10% (bound 15%: met), worst 20% (bound 30%: met)"
    assert memory == "of memory, worst 16% (bound 15%: missed)"


def test_the_whole_bench_has_twenty_cases_and_more() -> None:
    compared = list(plan.cases(plan.FULL, plan.FULL.ranks))
    assert len(set(compared)) == len(compared) >= 20


@pytest.mark.slow
def test_a_row_for_each_case_with_what_was_predicted() -> None:
    """How close a prediction of time is, is the bench's business; memory depends on no other process."""
    said: list[str] = []
    outcome = plan.bench(TINY, said.append)
    assert outcome is not None
    assert [row.case for row in outcome.rows] == [case.title(TINY) for case in plan.cases(TINY, TINY.ranks)]
    assert len(said) == len(outcome.rows)
    for row in outcome.rows:
        assert row.median_s > 0
        assert row.more["predicted_s"] == pytest.approx(row.median_s * (1 + row.more["time_error"]))
        assert ("communication_s" in row.more) == ("2 x" in row.case)
        assert row.added_bytes is not None
        assert abs(row.more["predicted_bytes"] - row.added_bytes) < 8 << 20


@pytest.mark.slow
def test_the_error_of_a_rank_names_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(TINY, encoders=("no_such_encoder",), ranks=(1,))
    with pytest.raises(plan.CaseError, match="no_such_encoder, 1 x 8 rows, ddp: "):
        plan.bench(settings, lambda _: None)
