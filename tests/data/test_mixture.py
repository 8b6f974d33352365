"""Several sets at fixed shares: as much a function of (seed, step) as the order of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clae_dist.config import Batch, Config, Data
from clae_dist.data.loader import load
from clae_dist.data.manifest import Manifest, load_manifest, write_manifest
from clae_dist.data.mixture import MixedOrder, mix
from clae_dist.data.shards import ShardReader
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import DataError
from clae_dist.world import World

SIZES = ([7, 5, 8], [30, 31], [4])
SHARES = (0.5, 0.3, 0.2)


def order(seed: int = 0, global_size: int = 12, shuffle_shards: int = 2) -> MixedOrder:
    return MixedOrder(SIZES, SHARES, global_size, shuffle_shards, seed)


def which_set(ids: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum([sum(sizes) for sizes in SIZES]), ids, side="right")


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (1 / 3, 1 / 3, 1 / 3), (0.5, 0.3, 0.2), (0.07, 0.9, 0.03), (1.0,)])
def test_the_first_samples_have_the_shares_to_within_a_sample_or_two(shares: tuple[float, ...]) -> None:
    mixed = MixedOrder([[10]] * len(shares), shares, 1, 1, 0)
    for start in (0, 10**9):
        n = start + np.arange(5000)
        counts = mixed.counts(n)
        assert (counts.sum(0) == n).all()
        steps = np.diff(counts, axis=1)
        assert set(np.unique(steps)) <= {0, 1}
        assert (steps.sum(0) == 1).all()  # one set a sample
        assert np.abs(counts - np.array(shares)[:, None] * n).max() < len(shares)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [0, 7, 10**8])
def test_a_global_batch_depends_on_no_number_of_ranks(step: int, world_size: int) -> None:
    whole = order().batch(step)
    parts = [order().batch(step, rank, world_size) for rank in range(world_size)]
    for name in ("epochs", "shards", "rows", "ids"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_each_set_is_passed_through_again_and_again_without_leaving_an_image_out() -> None:
    mixed = order(seed=3)
    ids = np.concatenate([mixed.batch(step).ids for step in range(60)])
    sets = which_set(ids)
    for index, sizes in enumerate(SIZES):
        mine, total = ids[sets == index], sum(sizes)
        passes = [mine[start : start + total] for start in range(0, len(mine) - total + 1, total)]
        assert len(passes) >= 3
        for one in passes:
            assert len(np.unique(one)) == total
        assert not all(np.array_equal(one, passes[0]) for one in passes[1:])  # each in an order of its own


def test_places_lead_to_the_ids() -> None:
    sizes = np.concatenate([np.array(part) for part in SIZES])
    first = np.concatenate([[0], np.cumsum(sizes)])
    for step in (0, 5, 1000):
        places = order().batch(step)
        assert (places.rows < sizes[places.shards]).all()
        assert np.array_equal(first[places.shards] + places.rows, places.ids)


def test_another_seed_is_another_order_of_the_same_sets() -> None:
    one, other = order(seed=0).batch(3), order(seed=1).batch(3)
    assert not np.array_equal(one.ids, other.ids)
    assert np.array_equal(which_set(one.ids), which_set(other.ids))


@pytest.mark.parametrize("start", [0, 9, 33])
def test_shards_are_announced_before_they_are_read(start: int) -> None:
    mixed = order()
    known: dict[int, int] = {}
    for step, shard in mixed.shards_needed(range(start, start + 40)):
        known.setdefault(shard, step)
        last = step
    for step in range(start, start + 40):
        for shard in mixed.batch(step).shards.tolist():
            assert known[shard] <= step
    assert last < start + 40
    again = [step for step, shard in mixed.shards_needed(range(start, start + 40)) if shard == 5]
    assert len(again) > 3  # a small set is passed through many times, and may have left the cache


# ---- sets ----


def renamed(made: Manifest, name: str, classes: tuple[str, ...]) -> Manifest:
    kept = {"source": made.source, "licence": f"of {name}", "quarantined": 1, "preparation": made.preparation}
    return write_manifest(made.folder, name=name, classes=classes, splits=made.splits, **kept)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    folder = tmp_path_factory.mktemp("sets")
    one = write_synthetic_set(folder / "one", 20, 20, num_shards=2)
    return [one, renamed(write_synthetic_set(folder / "other", 31, 24, num_shards=3), "other", ("two", "three"))]


def test_several_sets_read_as_one(sets: list[Manifest]) -> None:
    mixed = mix(sets, [0.75, 0.25], "train")
    assert mixed.classes == ("one", "three", "two")
    assert mixed.num_samples("train") == 51
    assert (mixed.licence, mixed.quarantined) == ("none needed; of other", 1)
    whole, *parts = (ShardReader(one, "train") for one in (mixed, *sets))
    for shard, (part, own) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]):
        for row in range(whole.sizes[shard]):
            image, label = whole.read(shard, row)
            same, own_label = parts[part].read(own, row)
            assert torch.equal(image, same)
            assert mixed.classes[label] == sets[part].classes[own_label]


def test_what_makes_another_mixture(sets: list[Manifest]) -> None:
    digests = {
        mix(chosen, shares, split).digest
        for chosen, shares, split in (
            (sets, [0.75, 0.25], "train"),
            (sets, [0.5, 0.5], "train"),
            (sets[::-1], [0.75, 0.25], "train"),
            (sets[:1] * 2, [0.75, 0.25], "train"),
        )
    }
    assert len(digests) == 4
    assert mix([load_manifest(one.folder) for one in sets], [0.75, 0.25], "train").digest in digests
    with pytest.raises(DataError, match="has no split 'val'"):
        mix(sets, [0.75, 0.25], "val")


@pytest.mark.parametrize("size", [2, 4])
def test_batches_of_a_mixture_are_the_same_for_every_number_of_ranks(sets: list[Manifest], size: int) -> None:
    mixed = mix(sets, [0.75, 0.25], "train")
    config = Config(data=Data(image_size=16, workers=0), batch=Batch(global_size=8))
    alone, *parts = (
        list(load(mixed, config, replace(World.single("cpu"), rank=rank, size=ranks), 3, 12))
        for ranks in (1, size)
        for rank in range(ranks)
    )
    for step, batch in enumerate(alone):
        assert torch.equal(torch.cat([part[step].views for part in parts], 1), batch.views)
        assert torch.equal(torch.cat([part[step].ids for part in parts]), batch.ids)
        assert int((batch.ids >= 20).sum()) == 2  # a quarter of eight


def test_a_damaged_image_of_a_mixture_is_named_with_its_set(tmp_path: Path) -> None:
    made = write_synthetic_set(tmp_path / "one", 10, 20)
    other = renamed(write_synthetic_set(tmp_path / "other", 10, 20), "other", ("one", "two"))
    path = other.folder / other.splits["train"][0].name
    data = bytearray(path.read_bytes())
    offset = int(other.index(other.splits["train"][0])[3, 0])
    data[offset : offset + 8] = b"notaJPEG"
    path.write_bytes(data)
    bad = ShardReader(mix([made, other], [0.5, 0.5], "train"), "train").read_or_next(1, 3).bad
    assert list(bad) == ["sample 3 of 1-other/train-000000.tar"]
