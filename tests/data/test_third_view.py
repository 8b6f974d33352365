"""A third view of an image: bare, or weakly augmented, and the same on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clae_dist.config import Batch, Config, Data, Train
from clae_dist.data.loader import LoadedBatch, load
from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.data.views import centre_view, shifted_view
from clae_dist.methods.advcl import AdvClSettings
from clae_dist.methods.air import AirSettings
from clae_dist.methods.simclr import SimClr
from clae_dist.world import World
from tests.ranks import RankPool
from tests.small_run import small_run
from tests.training.disturbed import train_on

SIZE, PAD = 16, 2


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("data") / "shards", 24, SIZE, num_shards=2)


def batch(manifest: Manifest, method: object, rank: int = 0, size: int = 1, workers: int = 0) -> LoadedBatch:
    data = Data(image_size=SIZE, workers=workers)
    config = Config(data=data, batch=Batch(global_size=8), method=method)  # type: ignore[arg-type]
    (found,) = load(manifest, config, replace(World.single("cpu"), rank=rank, size=size), 1, 2)
    return found


def test_the_first_two_views_do_not_depend_on_it(manifest: Manifest) -> None:
    plain = batch(manifest, SimClr.Settings())
    assert plain.views.shape[0] == 2
    for method in (AirSettings(), AdvClSettings()):
        found = batch(manifest, method)
        assert found.views.shape == (3, 8, 3, SIZE, SIZE)
        assert torch.equal(found.views[:2], plain.views)
        assert torch.equal(found.draws[:2], plain.draws)


def test_a_bare_view_is_the_image_and_a_weak_one_is_moved(manifest: Manifest) -> None:
    bare, weak = (batch(manifest, method).views[2] for method in (AirSettings(), AdvClSettings()))
    moved = 0
    for image, found in zip(bare, weak, strict=True):
        assert torch.equal(centre_view(image, SIZE), image)
        padded = torch.nn.functional.pad(image, (PAD,) * 4)
        shifts = [(top, left) for top in range(2 * PAD + 1) for left in range(2 * PAD + 1)]
        (shift,) = [(i, j) for i, j in shifts if torch.equal(padded[:, i : i + SIZE, j : j + SIZE], found)]
        moved += shift != (PAD, PAD)
    assert moved


def test_every_shift_up_to_an_eighth_is_reached() -> None:
    image = torch.arange(1, SIZE * SIZE + 1, dtype=torch.uint8).view(1, SIZE, SIZE).expand(3, SIZE, SIZE)
    low, high = shifted_view(image, [0.0, 0.0], SIZE), shifted_view(image, [0.9999, 0.9999], SIZE)  # type: ignore[arg-type]
    assert torch.equal(low[:, PAD:, PAD:], image[:, :-PAD, :-PAD])
    assert torch.equal(high[:, :-PAD, :-PAD], image[:, PAD:, PAD:])
    assert not low[:, :PAD].any()
    assert not high[:, -PAD:].any()


def test_ranks_and_loader_processes_see_the_same_views(manifest: Manifest) -> None:
    whole = batch(manifest, AdvClSettings())
    parts = [batch(manifest, AdvClSettings(), rank, 2, workers=rank) for rank in range(2)]
    assert torch.equal(torch.cat([part.views for part in parts], 1), whole.views)


@pytest.mark.parametrize("method", [AirSettings(), AdvClSettings()])
def test_a_run_with_three_views(ranks: RankPool, manifest: Manifest, tmp_path: Path, method: AirSettings) -> None:
    config = small_run(manifest.folder, tmp_path / "run", method=method, train=Train(epochs=1, threads=1, knn_every=0))
    assert ranks.run(1, train_on, config) == ["finished"]
