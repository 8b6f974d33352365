"""The norm layers that are evaluated, exported and embedded are those that the method trains for, or evaluation.route."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clae_dist.config import Config, Evaluation
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.deploy.encoder import load_encoder
from clae_dist.deploy.export import export_encoder
from clae_dist.errors import ConfigError
from clae_dist.methods.acl import AclSettings
from clae_dist.methods.clae import ClaeSettings
from clae_dist.methods.simclr import SimClr
from clae_dist.runs.checkpoint import load_model
from tests.ranks import RankPool
from tests.small_run import small_run
from tests.training.disturbed import train_on


def test_auto_is_the_route_that_a_method_trains_for() -> None:
    assert Config(method=ClaeSettings()).evaluated_route == "clean"
    assert Config(method=AclSettings()).evaluated_route == "adversarial"
    assert Config(method=AclSettings(), evaluation=Evaluation(route="clean")).evaluated_route == "clean"
    assert Config(method=ClaeSettings(), evaluation=Evaluation(route="adversarial")).evaluated_route == "adversarial"
    with pytest.raises(ConfigError, match="evaluation.route is 'adversarial', but method.name=simclr has one route"):
        Config(method=SimClr.Settings(), evaluation=Evaluation(route="adversarial"))


@pytest.mark.slow
def test_exports_and_embeddings_follow_it(ranks: RankPool, tmp_path: Path) -> None:
    shards = write_synthetic_set(tmp_path / "shards", 24, 16)
    config = small_run(shards.folder, tmp_path / "run", method=AclSettings())
    config = replace(config, train=replace(config.train, epochs=1))
    assert ranks.run(1, train_on, config) == ["finished"]
    _, model, _ = load_model(config.folder)
    images = torch.rand(3, 3, config.data.image_size, config.data.image_size)
    model.eval()
    adversarial, clean = model.features(images, "adversarial"), model.features(images, "clean")
    assert not torch.allclose(adversarial, clean)
    torch.testing.assert_close(model.features(images), adversarial)
    torch.testing.assert_close(load_encoder(config.folder)(images), adversarial)
    torch.testing.assert_close(load_encoder(config.folder, route="clean")(images), clean)
    export = export_encoder(config.folder)
    torch.testing.assert_close(load_encoder(export)(images), adversarial)
    with pytest.raises(ConfigError, match="is an export, which holds the adversarial one; name the run"):
        load_encoder(export, route="clean")
