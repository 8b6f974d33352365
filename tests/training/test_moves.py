"""A run that one backend began on some ranks ends under another on fewer, with the weights of a run that nothing disturbed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clae_dist.config import Parallel
from clae_dist.data.manifest import Manifest
from tests.ranks import RankPool
from tests.training.disturbed import final, recipe, train_on


@pytest.mark.slow
def test_fsdp2_on_four_ranks_goes_on_under_ddp_on_two(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    whole = recipe(shards, tmp_path / "whole", precision="float64", knn_every=0, diagnose_every=100)
    assert ranks.run(1, train_on, whole) == ["finished"]
    config = replace(whole, run_dir=str(tmp_path / "moved"))
    sharded = replace(config, parallel=Parallel(backend="fsdp2"))
    assert ranks.run(4, train_on, sharded, 6) == ["lost"] * 4
    assert ranks.run(2, train_on, config) == ["finished"] * 2
    found, wanted = final(config), final(whole)
    for name, value in wanted["model"].items():
        torch.testing.assert_close(found["model"][name], value, atol=1e-8, rtol=0)  # float64 over 8 steps of Adam
    for name, entries in wanted["optimizer"].items():
        for key, value in entries.items():
            torch.testing.assert_close(found["optimizer"][name][key], value, atol=1e-8, rtol=0)
