"""Shards stay within both limits, also where images differ in size by a thousand."""

from __future__ import annotations

import random

import pytest

from data_prep.plan import make_plan
from data_prep.settings import PrepareSettings
from data_prep.sources.entry import Entry, Listing

LIMIT = 2_000_000


@pytest.mark.parametrize("seed", range(5))
def test_no_shard_is_larger_than_asked_for(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice([1_000, 1_000, 1_000, 900_000]) for _ in range(200)]
    entries = tuple(Entry(f"cat/{i:04d}.jpg", size, f"/images/{i}") for i, size in enumerate(sizes))
    settings = PrepareSettings(name="set", source="made here", test_share=0.0, shard_samples=50, shard_bytes=LIMIT)
    plan = make_plan(Listing(entries, frozenset({"cat"}), ()), settings, "/images")
    assert plan.num_images == 200
    for shard in plan.shards:
        assert len(shard.samples) <= 50
        assert sum(sample.entry.size for sample in shard.samples) <= LIMIT, shard.name
