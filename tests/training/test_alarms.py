"""Alarms: planted collapses and dead attacks are named before 5 % of a run, and healthy runs are left alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clae_dist.config import Attack, Config, Guard, Optim, Train
from clae_dist.data.manifest import Manifest
from clae_dist.methods.clae import ClaeSettings
from clae_dist.methods.simclr import SimClrSettings
from clae_dist.models import PretrainModel
from clae_dist.objectives.form import Rows
from clae_dist.recipe import Recipe
from clae_dist.training import train as training
from clae_dist.training.alarms import Alarms
from clae_dist.training.train import train
from clae_dist.world import World
from tests.small_run import small_run

STEPS = 60  # of a run; early measurements at steps 1 and 2
LAST = STEPS * 0.05
HEALTHY = {"cos_negative_mean": 0.5, "rank_me": 9.0, "uniformity": -1.7}
ATTACKED = {"attack_loss_before": 5.0, "attack_loss_after": 5.5, "attack_loss_noise": 5.05, "zero_gradient_share": 0.0}
SGD = Optim(name="sgd", learning_rate=0.05, scaling="none", warmup_epochs=0)


class _Ended(Exception):
    """The run has made the steps that a test looks at."""


def first_alarms(monkeypatch: pytest.MonkeyPatch, shards: Manifest, run_dir: Path, **sections: Any) -> tuple[set[str], str]:
    """Names of the alarms of the first steps of a run of 60, and its console."""
    attempt = training.NonFiniteSteps.attempt
    steps: list[int] = []

    def until_five_percent(self: Any, take_step: Any, batch: Any, step: int, settings: Any) -> Any:
        if step >= LAST:
            raise _Ended
        steps.append(step)
        return attempt(self, take_step, batch, step, settings)

    monkeypatch.setattr(training.NonFiniteSteps, "attempt", until_five_percent)
    length = Train(epochs=STEPS / 4, log_every=1, diagnose_every=1000, knn_every=0, threads=1)
    config = small_run(shards.folder, run_dir, **{"optim": SGD, "train": length, **sections})
    console = io.StringIO()
    with pytest.raises(_Ended):
        train(Recipe(config), World.single("cpu"), console)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]
    return {name for row in rows for name in row if name.startswith("alarm_")}, console.getvalue()


def patch_network(monkeypatch: pytest.MonkeyPatch, change: Callable[[PretrainModel], None]) -> None:
    build = training.build_model

    def changed(*args: Any, **more: Any) -> PretrainModel:
        model = build(*args, **more)
        change(model)
        return model

    monkeypatch.setattr(training, "build_model", changed)


def constant_projector(model: PretrainModel) -> None:
    (*_, last) = [module for module in model.projector.modules() if isinstance(module, nn.Linear)]
    assert last.bias is not None
    nn.init.zeros_(last.weight)
    nn.init.ones_(last.bias)
    last.requires_grad_(False)


class _Rounded(torch.autograd.Function):
    """Quantised inputs whose gradient is passed through as if they were not: it points nowhere."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor) -> torch.Tensor:
        return (images * 3).round() / 3

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(grad)


def before_the_encoder(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    forward = PretrainModel.features
    monkeypatch.setattr(PretrainModel, "features", lambda self, images, *a, **k: forward(self, change(images), *a, **k))


@pytest.mark.parametrize(
    "plant",
    ["constant projector", "no negatives", "learning rate"],
)
def test_a_collapse_is_named_before_five_percent(
    plant: str, monkeypatch: pytest.MonkeyPatch, shards: Manifest, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"method": SimClrSettings()}
    if plant == "constant projector":
        patch_network(monkeypatch, constant_projector)
    elif plant == "no negatives":
        from clae_dist.contrast.distributed import Contrast

        def pull_only(self: Any, a: Rows, b: Rows) -> torch.Tensor:
            return 100 * (1 - (a.mine * b.mine).sum(1)).mean()

        monkeypatch.setattr(Contrast, "__call__", pull_only)
    else:
        sections["optim"] = Optim(name="sgd", learning_rate=1e4, scaling="none", warmup_epochs=0)
    alarms, console = first_alarms(monkeypatch, shards, tmp_path / "run", **sections)
    assert alarms == {"alarm_collapse"}, console
    assert console.count("ALARM collapse at step 2") == 1
    assert "optim.learning_rate=" in console


@pytest.mark.parametrize(
    ("plant", "alarm"),
    [
        ("epsilon", "alarm_useless_attack"),
        ("quantised", "alarm_masked_attack"),
        ("detached", "alarm_masked_attack"),
        ("straight through", "alarm_masked_attack"),
    ],
)
def test_a_dead_attack_is_named_before_five_percent(
    plant: str, alarm: str, monkeypatch: pytest.MonkeyPatch, shards: Manifest, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"method": ClaeSettings(), "attack": Attack(epsilon=0.03)}
    if plant == "epsilon":
        sections["attack"] = Attack(epsilon=1e-8)
    elif plant == "quantised":
        before_the_encoder(monkeypatch, lambda images: (images * 255).round() / 255)
    elif plant == "detached":
        before_the_encoder(monkeypatch, lambda images: images * 0 + images.detach())
    else:
        before_the_encoder(monkeypatch, _Rounded.apply)
    alarms, console = first_alarms(monkeypatch, shards, tmp_path / "run", **sections)
    assert alarms & {alarm, "alarm_useless_attack"}, console
    assert plant == "straight through" or alarms == {alarm}


@pytest.mark.parametrize("method", [SimClrSettings(), ClaeSettings()], ids=["simclr", "clae"])
def test_a_healthy_run_has_no_alarm(method: Any, monkeypatch: pytest.MonkeyPatch, shards: Manifest, tmp_path: Path) -> None:
    alarms, console = first_alarms(monkeypatch, shards, tmp_path / "run", method=method)
    assert not alarms
    assert "ALARM" not in console


def judged(rows: list[tuple[int, dict[str, float]]], **guard: Any) -> tuple[list[dict[str, float]], list[str], dict[str, str]]:
    said: list[str] = []
    tags: dict[str, str] = {}
    alarms = Alarms(Config(guard=Guard(**guard)), 1000, said.append, tags.__setitem__)
    return [alarms.judge(step, row) for step, row in rows], said, tags


def test_a_cause_needs_two_measurements_after_the_first_step_and_is_said_once() -> None:
    collapsed = {**HEALTHY, "cos_negative_mean": 0.99999}
    metrics, said, tags = judged([(0, collapsed), (20, collapsed), (40, collapsed), (50, collapsed)])
    assert metrics == [{}, {}, {"alarm_collapse": 1.0}, {"alarm_collapse": 1.0}]
    assert len(said) == 1
    assert "optim.learning_rate=" in said[0]
    assert tags.keys() == {"alarm.collapse"}
    assert judged([(0, collapsed), (20, collapsed), (40, collapsed)], alarms=False)[0] == [{}, {}, {}]


def test_embeddings_that_training_pulls_together_are_a_collapse() -> None:
    fallen = {**HEALTHY, "cos_negative_mean": 0.99, "rank_me": 2.5}
    assert judged([(0, {**HEALTHY, "rank_me": 13.0}), (20, fallen), (40, fallen)])[0][2] == {"alarm_collapse": 1.0}
    assert judged([(0, fallen), (20, fallen), (40, fallen)])[0] == [{}] * 3  # as narrow as the network began


def test_a_fall_that_the_next_measurements_make_good_is_no_collapse() -> None:
    """AdvCL on CIFAR-10 falls to a spread of 0.013 in its first steps and then recovers."""
    low, more = ({**HEALTHY, "cos_negative_mean": cosine, "rank_me": 2.2} for cosine in (0.987, 0.985))
    assert judged([(0, {**HEALTHY, "rank_me": 20.0}), (20, low), (40, more)])[0] == [{}] * 3


def test_embeddings_that_spread_out_from_a_narrow_start_are_no_collapse() -> None:
    rows = [(step, {**HEALTHY, "cos_negative_mean": 1 - 1e-5 * 1.5**number}) for number, step in enumerate((0, 20, 40, 50))]
    assert judged(rows)[0] == [{}] * 4


@pytest.mark.parametrize(
    "measured",
    [
        # supcon: kNN 28.4 to 31.6 % in 144 steps, on an effective rank below 4
        [
            (0.730, 37.8),
            (0.882, 29.3),
            (0.964, 16.2),
            (0.971, 6.49),
            (0.965, 3.59),
            (0.947, 3.12),
            (0.951, 2.54),
            (0.936, 2.84),
        ],
        # ascl with model.projector=mlp_bn: a mean cosine of 0.989 at its narrowest
        [
            (0.322, 51.6),
            (0.710, 42.5),
            (0.931, 26.2),
            (0.985, 12.2),
            (0.989, 6.38),
            (0.982, 5.48),
            (0.941, 5.33),
            (0.922, 5.59),
        ],
    ],
    ids=["supcon", "ascl"],
)
def test_embeddings_that_draw_together_and_keep_learning_are_no_collapse(measured: list[tuple[float, float]]) -> None:
    """Measured on CIFAR-10 (bench/RECORD.md): either the spread or the rank alone falls below the limit."""
    rows = [(12 * number, {**HEALTHY, "cos_negative_mean": c, "rank_me": r}) for number, (c, r) in enumerate(measured)]
    assert judged(rows)[0] == [{}] * len(rows)


@pytest.mark.parametrize(
    ("change", "alarm"),
    [
        ({"attack_loss_after": 5.0}, "alarm_useless_attack"),
        ({"zero_gradient_share": 100.0, "attack_loss_after": 5.0}, "alarm_masked_attack"),
        ({"attack_loss_noise": 5.6}, "alarm_masked_attack"),
        ({"attack_loss_after": 4.0}, "alarm_useless_attack"),
        ({}, None),
        ({"attack_loss_after": float("nan")}, None),
    ],
)
def test_measurements_of_attacks(change: dict[str, float], alarm: str | None) -> None:
    row = {**HEALTHY, **ATTACKED, **change}
    assert judged([(20, row), (40, row)])[0][1] == ({alarm: 1.0} if alarm else {})


def test_early_measurements_end_before_five_percent() -> None:
    alarms = Alarms(Config(), 1000, print, print)
    assert [step for step in range(1000) if alarms.due(step)] == [20, 40]
    assert not any(Alarms(Config(), 40, print, print).due(step) for step in range(40))
