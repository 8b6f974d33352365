"""Damaged images and prepared sets: never a hang, a crash, another error than ours, or a difference that verify misses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzzing import fuzz


def test_what_inspect_accepts_decodes_to_the_same_size(tmp_path: Path) -> None:
    ends = fuzz("image", 150, tmp_path)
    assert ends["refused"] > 50
    assert ends["accepted"] > 10


def test_damage_to_a_prepared_set_is_named(tmp_path: Path) -> None:
    ends = fuzz("prepared_set", 40, tmp_path)
    assert min(ends[".npy refused"], ends[".tar refused"], ends[".json refused"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3))])
def test_thousands_of_mutations(tmp_path: Path, seed: int) -> None:
    for kind, count in (("image", 4000), ("prepared_set", 1000)):
        (tmp_path / kind).mkdir()
        fuzz(kind, count, tmp_path / kind, seed)


@pytest.mark.parametrize("kind, said", [("hangs_at_3", "Timeout (0:00:02)"), ("dies_at_3", "Aborted")])
def test_a_mutation_that_hangs_or_kills_is_named(tmp_path: Path, kind: str, said: str) -> None:
    """Of the harness itself: without it, a hang would be the whole run's, and a crash nobody's."""
    with pytest.raises(AssertionError, match=rf"{kind}: mutation 3 of seed 0 ended with") as failed:
        fuzz(kind, 10, tmp_path, limit_s=2.0)
    assert said in str(failed.value)
