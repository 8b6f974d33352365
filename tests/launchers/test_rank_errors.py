"""What a rank that breaks writes down, and what hosts that differ are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clae_dist.config import Config
from clae_dist.launchers import rank
from clae_dist.recipe import Recipe
from clae_dist.versions import differences


def test_neither_the_line_nor_the_traceback_of_a_broken_rank_holds_a_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*arguments: Any) -> None:
        try:
            raise OSError("GET https://me:canary-inner@host/a.tar failed")
        except OSError as error:
            raise RuntimeError("cannot read https://me:canary-outer@host/a.tar?token=canary-query") from error

    monkeypatch.setattr(rank, "train", train)
    with pytest.raises(rank.RankBroke, match="rank 0 of 1: RuntimeError: cannot read https://") as broke:
        rank.run_rank(Recipe(Config(run_dir=str(tmp_path))), None)
    log = (tmp_path / "error-rank-0.log").read_text()
    assert "canary" not in str(broke.value) + log
    assert log.count("https://") >= 2  # both errors are there, without their logins
    assert "Traceback" in log


def test_a_version_that_only_one_host_knows_is_a_difference() -> None:
    here, there = {"torch": "2.14.1", "Ray": "2.60.0"}, {"torch": "2.14.1"}
    assert differences(here, there, "a", "b") == "Ray is 2.60.0 on a, but none on b"
    assert differences(there, here, "b", "a") == "Ray is none on b, but 2.60.0 on a"
    assert differences(here, here, "a", "b") == ""
