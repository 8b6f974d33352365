"""Classifiers, which some forwards of a step use and some do not, under DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest

from clae_dist.config import Parallel
from clae_dist.world import World
from tests.methods.test_pseudo_labels import take_step
from tests.parallel.zero import STAGES, TOLERANCE, apart
from tests.ranks import RankPool


@pytest.mark.slow
@pytest.mark.parametrize("micro_size", [0, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_take_the_step_of_one_process(pair: RankPool, stage: Any, micro_size: int) -> None:
    one = take_step(World.single("cpu"), Parallel(), "group", 0, epsilon=0.0)
    zero = Parallel(backend="deepspeed", zero_stage=stage)
    for rank in pair.run(2, take_step, zero, "group", micro_size, 0.0):
        assert apart(rank.gradients, one.gradients) < TOLERANCE
