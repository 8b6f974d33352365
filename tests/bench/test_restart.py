"""`clae bench restart`: a run is killed for real, and its parts are those of its whole."""

from __future__ import annotations

import psutil
import pytest

from clae_dist.bench import restart


@pytest.mark.slow
def test_a_killed_run_is_measured_part_by_part() -> None:
    said: list[str] = []
    outcome = restart.bench(restart.QUICK, said.append)
    *parts, whole = outcome.rows
    assert [row.name for row in parts] == list(restart.PARTS)
    assert all(row.median_s > 0 for row in parts)
    assert whole.median_s == pytest.approx(sum(row.median_s for row in parts))
    assert said == [f"kill 1 of 1: {whole.median_s:.1f} s to the next new step"]
    ours = psutil.Process().children(recursive=True)
    assert not [child for child in ours if "clae_dist train" in " ".join(child.cmdline())]  # nothing is left


def test_a_run_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "_RECIPE", "nonsense: 1\n")
    with pytest.raises(restart.RunEndedError, match=r"made no progress:\n(.|\n)*nonsense"):
        restart.bench(restart.QUICK, lambda text: None)
