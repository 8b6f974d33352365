"""`data.long_tail`: counts, purity, and a set that the rest of the package takes for any other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from clae_dist.config import Data
from clae_dist.data.long_tail import long_tail, tail_counts
from clae_dist.data.manifest import Manifest
from clae_dist.data.shards import ShardReader
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("set") / "shards", 240, 16)


def content(manifest: Manifest) -> list[tuple[bytes, int]]:
    reader = ShardReader(manifest, "train")
    places = [(shard, row) for shard, size in enumerate(reader.sizes) for row in range(size)]
    return [(bytes(data), label) for data, label in (reader.encoded(*place) for place in places)]


def test_counts_are_those_of_cifar_lt() -> None:
    assert tail_counts([5000] * 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert tail_counts([5000] * 10, 10) == [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]
    assert tail_counts([7, 0, 3], 100) == [7, 0, 1]
    assert tail_counts([9], 100) == [9]


def test_a_class_keeps_its_number_of_images_and_nothing_else_changes(whole: Manifest) -> None:
    part, before = long_tail(whole, "train", 10, seed=3), content(whole)
    after = content(part)
    counts = tail_counts(np.bincount([label for _, label in before]).tolist(), 10)
    assert np.bincount([label for _, label in after]).tolist() == counts
    assert part.num_samples("train") == sum(counts) == len(after)
    assert part.class_counts == {"train": tuple(counts)}
    assert set(after) <= set(before)
    assert len(set(after)) == len(after)


def test_it_is_a_function_of_the_seed(whole: Manifest) -> None:
    one, again, other = (long_tail(whole, "train", 10, seed) for seed in (3, 3, 4))
    assert content(one) == content(again)
    assert one.digest == again.digest != other.digest != whole.digest
    assert content(one) != content(other)
    assert long_tail(whole, "train", 20, 3).digest != one.digest


def test_no_imbalance_is_all_labelled_images(whole: Manifest) -> None:
    assert content(long_tail(whole, "train", 1, seed=0)) == content(whole)


def test_it_refuses_a_set_without_labels_and_other_settings(whole: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    for tail in (0.5, -1.0):
        with pytest.raises(ConfigError, match="data.long_tail is"):
            Data(long_tail=tail)
    with pytest.raises(ConfigError, match=r"data.long_tail is 2.0; it is drawn from one set; remove data.mixture"):
        Data(long_tail=2.0, mixture={"other": 0.5})
    index = Manifest.index
    monkeypatch.setattr(Manifest, "index", lambda self, shard: index(self, shard) * [1, 1, 0] - [0, 0, 1])
    with pytest.raises(DataError, match="data.long_tail is 10, but no image of split 'train' of .* has a label"):
        long_tail(replace(whole), "train", 10, 0)
