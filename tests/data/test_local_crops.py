"""Small crops of an image (multi-crop): what is loaded, the term that they add, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clae_dist.config import Batch, Config, Data, Model, Objective, Train, Views
from clae_dist.data.loader import LoadedBatch, load
from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import ConfigError
from clae_dist.methods.clae import ClaeSettings
from clae_dist.methods.moco import MoCoSettings
from clae_dist.methods.simclr import SimClrSettings
from clae_dist.models import check_model
from clae_dist.world import World
from tests.methods.attacked import TEMPERATURE, N, Tried
from tests.ranks import RankPool
from tests.small_run import small_run
from tests.training.disturbed import train_on

VIEWS = Views(local_crops=3, local_size=8)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("data") / "shards", 24, 16, num_shards=2)


def batch(manifest: Manifest, views: Views, rank: int = 0, size: int = 1, workers: int = 0) -> LoadedBatch:
    config = Config(data=Data(image_size=16, workers=workers), batch=Batch(global_size=8), views=views)
    (found,) = load(manifest, config, replace(World.single("cpu"), rank=rank, size=size), 1, 2)
    return found


def test_crops_come_beside_the_same_two_views_on_any_number_of_ranks(manifest: Manifest) -> None:
    plain, found = batch(manifest, Views()), batch(manifest, VIEWS)
    assert plain.local is None
    assert found.local is not None
    assert torch.equal(found.views, plain.views)
    assert torch.equal(found.draws[:2], plain.draws)
    assert found.local.shape == (3, 8, 3, 8, 8)
    assert found.draws.shape[0] == 5
    assert len({found.local[crop, 0].numpy().tobytes() for crop in range(3)}) == 3
    parts = [batch(manifest, VIEWS, rank, 2, workers=rank).local for rank in range(2)]
    assert torch.equal(torch.cat([part for part in parts if part is not None], 1), found.local)


@pytest.mark.parametrize("method", [SimClrSettings(), ClaeSettings()])
def test_each_crop_is_drawn_to_both_views(method: SimClrSettings) -> None:
    tried = Tried(method, norm="group")
    crops = [torch.rand(N, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(crop)) for crop in (1, 2)]
    step = type(tried.step)(tried.step.run, (tried.x, tried.y), tried.step.moment)
    step.more_views = crops
    terms = step.run.method.losses(step, tried.x, tried.y)
    assert terms.keys() - {"local"} == tried.terms.keys()
    views = [tried.model(images).detach() for images in (tried.x, tried.y, *crops)]
    rows, total = torch.cat(views), 0.0
    for crop in (2, 3):
        for k in range(N):
            s = rows @ views[crop][k] / TEMPERATURE
            s[crop * N + k] = -torch.inf
            total += float((s.logsumexp(0) - s[[k, N + k]]).mean())
    assert terms["local"][0] == 1
    assert terms["local"][1].item() == pytest.approx(total / (2 * N), abs=1e-12)


def test_a_run_with_small_crops(ranks: RankPool, manifest: Manifest, tmp_path: Path) -> None:
    config = small_run(
        manifest.folder, tmp_path / "run", method=ClaeSettings(), views=VIEWS, train=Train(epochs=1, threads=1, knn_every=0)
    )
    assert ranks.run(2, train_on, config) == ["finished"] * 2


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="views.local_crops is 3, for which method.name=moco has no term; remove it, or use"):
        Config(method=MoCoSettings(), views=VIEWS)
    with pytest.raises(ConfigError, match="objective.name is 'uel', which has no form for more than two views"):
        Config(objective=Objective("uel"), views=VIEWS)
    with pytest.raises(ConfigError, match="views.local_scale.*use low <= high"):
        Views(local_scale=(0.5, 0.2))
    config = Config(data=Data(image_size=32), model=Model(encoder="timm/vit_tiny_patch16_224"), views=Views(local_crops=1))
    with pytest.raises(ConfigError, match="views.local_size is 16, which model.encoder 'timm/vit_tiny_patch16_224' does not"):
        check_model(config)
    check_model(replace(config, model=Model(encoder="small_resnet")))
