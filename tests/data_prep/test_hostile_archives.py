"""Damaged and hostile archives: images in are images kept and set aside, and nothing is written but the set."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzzing import fuzz


def test_archives_are_prepared_whole_or_refused(tmp_path: Path) -> None:
    ends = fuzz("archive", 100, tmp_path)
    assert ends["refused"] > 50
    assert ends["prepared"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3))])
def test_thousands_of_archives(tmp_path: Path, seed: int) -> None:
    fuzz("archive", 1500, tmp_path, seed)
