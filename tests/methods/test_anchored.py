"""Anchored: its loss and attack against loops over images, and a frozen original that stays as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.config import Attack, Config, Data, Model
from clae_dist.errors import ConfigError
from clae_dist.methods.anchored import AnchoredSettings
from clae_dist.models import build_model
from clae_dist.parity.observe import SyntheticRun
from clae_dist.world import World
from tests.methods.attacked import PGD, Tried, noise
from tests.methods.test_every_recipe import CASES, small
from tests.ranks import RankPool

KEYS = "keys"


def distance(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean over images of the squared distance, as a double loop."""
    total = torch.zeros((), dtype=torch.float64)
    for row, target in zip(rows, targets, strict=True):
        for value, wanted in zip(row, target, strict=True):
            total = total + (value - wanted) ** 2
    return total / len(rows)


def test_loss_and_gradient_are_the_squared_distances() -> None:
    tried = Tried(AnchoredSettings(clean=0.25), norm="group")
    (x_adv,) = tried.attacked
    original = tried.model(tried.x).detach()
    rows = [tried.model(images).detach().requires_grad_() for images in (tried.x, x_adv)]
    expected = 0.25 * distance(rows[0], original) + distance(rows[1], original)
    total = tried.step.total(tried.terms)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(expected, rows)
    total.backward()
    for embedding, gradient in zip(tried.step.embeddings, gradients, strict=True):
        torch.testing.assert_close(embedding.z.grad, gradient, rtol=0, atol=1e-12)


def test_the_attack_moves_away_from_the_frozen_features_in_evaluation_mode() -> None:
    tried = Tried(AnchoredSettings())
    model = tried.as_before()
    model.load_state_dict(tried.backend.key_weights(), strict=False)  # its running statistics are those of the beginning
    original = model(tried.x).detach()
    model = tried.as_before()
    at = (tried.x + PGD.epsilon * (2 * noise(0) - 1)).clamp(0, 1)
    for _ in range(PGD.steps):
        at = at.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(distance(model(at), original), at)
        delta = (at - tried.x + PGD.step_size * gradient.sign()).clamp(-PGD.epsilon, PGD.epsilon)
        at = (tried.x + delta).clamp(0, 1)
    torch.testing.assert_close(tried.attacked[0], at.detach(), rtol=0, atol=1e-12)
    assert {embedding.route for embedding in tried.step.embeddings} == {"clean"}


def test_images_do_not_depend_on_each_other() -> None:
    order = [3, 1, 5, 0, 2, 4]
    one, other = Tried(AnchoredSettings(), norm="group"), Tried(AnchoredSettings(), norm="group", order=order)
    torch.testing.assert_close(one.attacked[0][order], other.attacked[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(one.terms["adversarial"][1], other.terms["adversarial"][1], rtol=0, atol=1e-12)


def test_without_perturbation_the_original_is_the_minimum() -> None:
    tried = Tried(AnchoredSettings(clean=1.0), Attack("pgd", epsilon=0.0, steps=1, random_start=True), norm="group")
    total = tried.step.total(tried.terms)
    assert total == 0
    total.backward()
    assert all(not embedding.z.grad.any() for embedding in tried.step.embeddings)


def test_embeddings_are_the_features() -> None:
    config = Config(
        data=Data(image_size=16),
        model=Model(encoder="small_resnet", init="somewhere"),
        method=AnchoredSettings(),
        attack=PGD,
    )
    model, images = build_model(config).eval(), torch.rand(2, 3, 16, 16)
    assert torch.equal(model(images), model.features(images))
    assert not list(model.projector.parameters())
    assert not any("adversarial" in name for name in model.state_dict()), "one encoder, clean and attacked"


def keys_after_steps(world: World, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The frozen weights before and after two steps, of which the first has changed the encoder."""
    run = SyntheticRun(config, world)
    before = run.state()
    before = {name: value.clone() for name, value in before[KEYS].items()}
    run.step(0)
    run.step(1)
    after = run.state()
    changed = [name for name, value in after[KEYS].items() if not torch.equal(value, after["model"][name])]
    assert changed, "the encoder itself learns"
    return before, after[KEYS]


@pytest.mark.parametrize("backend", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_the_original_stays_as_the_run_began(ranks: RankPool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("cifar10/anchored", 2, f"parallel.backend={backend}")
    for before, after in ranks.run(2, keys_after_steps, config):
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
    if backend == "ddp":  # on purpose: an average that follows the encoder is seen
        monkeypatch.setattr(AnchoredSettings, "key_decay", 0.9)
        before, after = keys_after_steps(World.single("cpu"), small("cifar10/anchored", 1))
        assert not all(torch.equal(after[name], value) for name, value in before.items())


def after_a_step(world: World, config: Config) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The loss of the first step, and the state of the model before and after it."""
    run = SyntheticRun(config, world)
    before = {name: value.clone() for name, value in run.state()["model"].items()}
    return float(run.step(0).loss), before, run.state()["model"]


def test_with_fixed_statistics_only_the_attack_makes_a_loss(ranks: RankPool) -> None:
    """Batch norm as the frozen original has it, in training as well: no other image and no batch changes a feature."""
    config = small("cifar10/anchored", 2, "attack.epsilon=0", "method.clean=1")
    loss, before, after = ranks.run(2, after_a_step, config)[0]
    assert loss < 1e-20
    assert all(torch.equal(after[name], value) for name, value in before.items() if "running" in name)
    config = small("cifar10/anchored", 2, "attack.epsilon=0", "method.clean=1", "model.norm=global")
    loss, before, after = ranks.run(2, after_a_step, config)[0]
    assert loss > 1e-3, "batch statistics differ from running ones"
    assert any(not torch.equal(after[name], value) for name, value in before.items() if "running" in name)


def test_fixed_statistics_need_a_start() -> None:
    with pytest.raises(ConfigError, match=r"model.norm is 'fixed'.*no running statistics to keep"):
        Model(norm="fixed")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"model": Model(encoder="small_resnet")},
            "model.init is '', but method.name=anchored fine-tunes",
        ),
        ({"attack": replace(PGD, random_start=False)}, "use attack.random_start=true"),
    ],
)
def test_refused(tmp_path: Path, changed: Any, words: str) -> None:
    assert "cifar10/anchored" in CASES, "parity and resuming are tested with every recipe"
    settings = {"model": Model(encoder="small_resnet", init="somewhere"), "attack": PGD, **changed}
    with pytest.raises(ConfigError, match=words):
        Config(method=AnchoredSettings(), **settings)
