"""Which parts of an encoder a task trains, and how fast."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clae_dist.config import Config, Data, Model, Optim
from clae_dist.downstream.classify import ClassifySettings
from clae_dist.errors import ConfigError
from clae_dist.models import build_model
from clae_dist.models.blocks import depths, encoder_blocks
from clae_dist.parallel.optim import make_optimizer
from clae_dist.parity.observe import SyntheticRun
from clae_dist.world import World
from tests.downstream.test_losses import C, settings
from tests.ranks import RankPool


def changed(world: World, config: Config) -> dict[str, bool]:
    """The tensors of the model that two steps have changed."""
    run = SyntheticRun(config, world)
    before = {name: value.clone() for name, value in run.backend.weights().items()}
    for number in range(2):
        run.step(number)
    return {name: not torch.equal(value, before[name]) for name, value in run.backend.weights().items()}


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
@pytest.mark.parametrize("blocks", [0, 1])
def test_what_is_not_trained_stays_with_its_statistics(ranks: RankPool, blocks: int, backend: str) -> None:
    config = settings(ClassifySettings(classes=C, blocks=blocks), parallel=_backend(backend))
    names = {name for name, _ in build_model(config).encoder.named_parameters()}
    last = f"encoder.{_name_of_last_block(config)}."
    for found in ranks.run(2, changed, config):
        assert found["classifiers.weight"]
        touched = {name for name, moved in found.items() if moved and name.startswith("encoder.")}
        assert all(name.startswith(last) for name in touched), touched
        assert bool(touched) is (blocks > 0)
        assert {f"encoder.{name}" for name in names} <= set(found)


def _backend(name: str) -> Any:
    from clae_dist.config import Parallel

    return Parallel(backend=name)  # type: ignore[arg-type]


def _name_of_last_block(config: Config) -> str:
    encoder = build_model(config).encoder
    return next(name for name, module in encoder.named_modules() if module is encoder_blocks(encoder)[-1])


def test_rates_fall_from_the_head_to_the_first_layer() -> None:
    for encoder, count in (("timm/vit_tiny_patch16_224", 12), ("torchvision/resnet18", 8)):
        config = settings(
            ClassifySettings(classes=C),
            model=Model(encoder=encoder),
            data=Data(image_size=224 if "vit" in encoder else 32),
            optim=Optim(name="sgd", scaling="none", warmup_epochs=0, layer_decay=0.5),
        )
        with torch.device("meta"):
            model = build_model(config)
        found = {
            p: group["lr_scale"] for group in make_optimizer(config.optim, 1.0, model).param_groups for p in group["params"]
        }
        assert len(found) == len(list(model.parameters()))
        assert {found[p] for p in model.classifiers.parameters()} == {1.0}  # type: ignore[union-attr]
        for number, block in enumerate(encoder_blocks(model.encoder), 1):
            assert {found[p] for p in block.parameters()} == {0.5 ** (count + 2 - number - ("vit" not in encoder))}
        first = next(model.encoder.parameters())
        assert depths(model.encoder)[first] == 0
        assert found[first] == min(found.values())


def test_one_rate_without_layer_decay_leaves_the_groups_as_they_were() -> None:
    model = build_model(settings(ClassifySettings(classes=C)))
    groups = make_optimizer(Optim(name="sgd", warmup_epochs=0), 0.1, model).param_groups
    assert [group["weight_decay"] for group in groups] == [1e-6, 0.0]
    assert {group["lr_scale"] for group in groups} == {1.0}


def test_zero_refuses_a_frozen_part() -> None:
    with pytest.raises(ConfigError, match=r"method\.blocks is 0.*use parallel\.backend=ddp or fsdp2"):
        settings(ClassifySettings(classes=C, blocks=0), parallel=_backend("deepspeed"))


def test_a_step_takes_the_rate_of_each_depth() -> None:
    optim = Optim(name="sgd", scaling="none", warmup_epochs=0, layer_decay=0.5)
    backend = SyntheticRun(settings(ClassifySettings(classes=C), optim=optim), World.single("cpu")).backend
    backend.set_learning_rate(2.0)
    rates = {group["lr"] for group in backend._optimizer().param_groups}
    assert max(rates) == 2.0
    assert {rate / 2 for rate in rates} >= {0.5, 0.25}


def test_more_blocks_than_the_encoder_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="method.blocks is 99, but the encoder has 12 blocks; use at most 12"):
        build_model(settings(ClassifySettings(classes=C, blocks=99), model=Model(encoder="timm/vit_tiny_patch16_224")))
