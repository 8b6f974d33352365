from __future__ import annotations

from dataclasses import replace

import pytest

from clae_dist.bench import probe
from clae_dist.bench.measure import UnequalError
from clae_dist.evaluation.linear import Probe

TINY = replace(probe.QUICK, train=400, test=300, width=12, classes=4, repeats=1)


def test_rows_of_both_contenders_at_one_penalty_and_with_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_POINTS", 3)  # of 300 images
    outcome = probe.bench(TINY, lambda _: None)
    assert [row.name for row in outcome.rows] == ["clae", "scikit-learn"] * 2
    for ours, theirs in (outcome.rows[:2], outcome.rows[2:]):
        assert ours.case == theirs.case
        assert ours.more["accuracy"] == pytest.approx(theirs.more["accuracy"], abs=3)
        assert 25 < theirs.more["accuracy"] < 95, "a set on which every classifier is right compares nothing"


def test_a_probe_that_is_worse_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "linear_probe", lambda *_: Probe(10.0, 1e-3, None))
    with pytest.raises(UnequalError, match="the probe is worse"):
        probe.bench(TINY, lambda _: None)
