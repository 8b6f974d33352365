"""`clae parity` says yes to what is right, and no, with the reason, to what is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clae_dist.config import Attack, Batch, Config, Data, Model, Optim, Train
from clae_dist.contrast import distributed
from clae_dist.methods.acl import AclSettings
from clae_dist.methods.clae_fused import ClaeFused
from clae_dist.methods.simclr import SimClr
from clae_dist.parity.compare import Parity, compare, compare_steps, difference, table
from clae_dist.parity.observe import observe, reference
from clae_dist.parity.run import alone
from clae_dist.world import World
from tests import processes, steps
from tests.ranks import RankPool

CONFIG = Config(
    data=Data(image_size=16),
    batch=Batch(global_size=8),
    model=Model(encoder="small_resnet", projector_dim=16),
    optim=Optim(name="sgd", learning_rate=0.1, scaling="none", warmup_epochs=0, momentum=0.9),
    train=Train(precision="float64", threads=1),
)


def on_ranks(world: World, config: Config, wrong: str) -> Parity:
    one, starts = reference(alone(config), World.single("cpu"), 2, "float64")
    with broken(wrong):
        many = observe(config, world, 2, starts)
    return compare_steps(config, world.size, "float64", many, one, one)


def _own(shift: torch.Tensor, group: Any) -> torch.Tensor:
    return shift.repeat(dist.get_world_size(group), 1, 1)


@contextmanager
def broken(how: str) -> Iterator[None]:
    changes: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "own shifts for everyone's": (distributed, "_shifts_of_all_ranks", _own),
        "detached": (distributed, "gather_rows", lambda rows, group: distributed._GatherRows.apply(rows, group).detach()),
    }
    if not how:
        yield
        return
    module, name, replacement = changes[how]
    right = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, right)


@pytest.mark.parametrize(
    ("world_size", "encoder"),
    [
        pytest.param(4, "small_resnet", marks=pytest.mark.slow),
        (2, "small_resnet"),
        pytest.param(2, "timm/vit_tiny_patch16_224", marks=pytest.mark.slow),
        pytest.param(4, "timm/vit_tiny_patch16_224", marks=pytest.mark.slow),
    ],
)
def test_what_is_right_passes(ranks: RankPool, world_size: int, encoder: str) -> None:
    """Dual routes with global batch norm, and LayerNorm without routes."""
    config = replace(CONFIG, model=replace(CONFIG.model, encoder=encoder))
    for found in ranks.run(world_size, on_ranks, config, ""):
        assert found.passed, found
        assert found.delta_sign_agreement == 1
        assert (
            max(found.param_grad.absolute, found.input_grad.absolute, found.loss.absolute, found.params_after.absolute) < 1e-10
        )


def test_views_of_one_forward_are_recomputed_along_their_routes(ranks: RankPool) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, activation_checkpointing=True))
    for found in ranks.run(2, on_ranks, config, ""):
        assert found.passed, found


@pytest.mark.parametrize(
    "variant",
    [
        steps.variant(ClaeFused.Settings, fraction=0.5),
        steps.variant(attack_name="pgd", steps=2, random_start=True),
        steps.variant(SimClr.Settings),
    ],
)
def test_methods_pass(ranks: RankPool, variant: steps.Variant) -> None:
    found = ranks.run(2, on_ranks, replace(CONFIG, method=variant.method, attack=variant.attack), "")[0]
    assert found.passed, found
    lines = "\n".join(table(found))
    assert ("attacks no images" in lines) == ("signs of delta" not in lines) == (variant.method.name == "simclr")


def in_float32(world: World, config: Config, wrong: str) -> Parity:
    here = World.single("cpu")
    one, starts = reference(alone(config), here, 2, "float32")
    single = observe(alone(config), here, 2, starts)
    with broken(wrong):
        return compare_steps(config, world.size, "float32", observe(config, world, 2, starts), single, one)


@pytest.mark.slow
def test_a_long_attack_from_a_random_start_passes_in_float32(ranks: RankPool) -> None:
    """Every precision has the same noise, and rounding may turn signs in its later steps; a wrong gather still fails."""
    attack = Attack("pgd", epsilon=0.03, steps=5, step_size=0.008, random_start=True, statistics="running")
    config = replace(CONFIG, method=AclSettings(), attack=attack, train=replace(CONFIG.train, precision="float32"))
    found = ranks.run(2, in_float32, config, "")[0]
    assert found.passed, found
    assert found.input_grad.relative < 1e-3
    assert not ranks.run(2, in_float32, config, "own shifts for everyone's")[0].passed


@pytest.mark.parametrize(
    ("wrong", "way", "cause"),
    [
        ("own shifts for everyone's", "log_sum_exp", "rows of other ranks get no gradient, or the wrong one"),
        ("detached", "reduce_scatter", "rows of other ranks get no gradient, or the wrong one"),
    ],
)
def test_a_wrong_gather_fails_with_its_usual_cause(ranks: RankPool, wrong: str, way: Any, cause: str) -> None:
    config = replace(CONFIG, objective=replace(CONFIG.objective, gather=way))
    found = ranks.run(2, on_ranks, config, wrong)[0]
    assert not found.passed
    assert found.param_grad.absolute > 1e-6
    assert cause in found.cause
    lines = "\n".join(table(found))
    assert "FAILED" in lines
    assert f"differs, {found.param_grad.first} first, by" in lines


def test_local_statistics_are_named_as_the_cause(ranks: RankPool) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, norm="local"))
    found = ranks.run(2, on_ranks, config, "")[0]
    assert not found.passed
    assert "model.norm is 'local'" in found.cause


def test_batch_statistics_of_micro_batches_are_named_as_the_cause(ranks: RankPool) -> None:
    found = ranks.run(2, on_ranks, replace(CONFIG, batch=Batch(global_size=8, micro_size=2)), "")[0]
    assert not found.passed
    assert "batch.micro_size with batch norm" in found.cause


def test_a_scaled_gradient_is_told_from_a_wrong_one() -> None:
    (one,) = observe(CONFIG, World.single("cpu"), 1)
    many = replace(one, grads={name: 2 * value for name, value in one.grads.items()})
    found = compare(CONFIG, 2, "float64", many, one, one)
    assert not found.passed
    assert "2 times the length" in found.cause
    assert "must not both sum or both average" in found.cause


def test_differences_that_are_no_rounding() -> None:
    one = {"a": torch.tensor([1.0, 2.0]), "zero": torch.zeros(2)}
    assert difference(one, one).relative == 0
    found = difference({**one, "a": torch.tensor([1.0, 2.5])}, one)
    assert (found.absolute, found.relative, found.tensor) == (0.5, 0.25, "a")
    # A tensor that is all but zero is measured against a thousandth of the largest.
    assert difference({**one, "zero": torch.tensor([0.0, 1e-9])}, one).relative == pytest.approx(1e-9 / 2e-3)
    for wrong in (
        {"a": one["a"]},
        {**one, "b": one["a"]},
        {**one, "a": torch.tensor([1.0, torch.nan])},
        {**one, "a": torch.ones(3)},
    ):
        assert difference(wrong, one).absolute == float("inf")
    assert difference({**one, "b": one["a"]}, one).first == "b"


def test_the_first_tensor_that_differs_is_told_from_the_one_that_differs_most() -> None:
    right = {"z": torch.ones(2), "m": torch.ones(2), "a": torch.ones(2)}  # as the model orders them
    found = difference({**right, "m": torch.full((2,), 1.001), "a": torch.full((2,), 3.0)}, right)
    assert (found.first, found.tensor) == ("m", "a")
    assert found.first_by == pytest.approx(1e-3, rel=1e-3)
    # What rounding alone does to one process is no difference, threefold.
    assert difference({**right, "m": torch.full((2,), 1.001)}, right, "float32", rounding=5e-4).first == ""
    assert difference({**right, "m": torch.full((2,), 1.002)}, right, "float32", rounding=5e-4).first == "m"


@pytest.mark.slow
def test_the_command_prints_one_json_object() -> None:
    done = processes.clae("parity", "data.image_size=16", "--world-size", "2", "--steps", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for quantity in ("loss", "param_grad", "input_grad", "params_after"):
        assert found[quantity]["absolute"] < 1e-10
        assert found[quantity]["relative"] < 1e-8
    assert found["delta_sign_agreement"] == 1
    assert (found["world_size"], found["backend"], found["dtype"], found["passed"]) == (2, "ddp", "float64", True)


@pytest.mark.slow
def test_the_command_fails_with_exit_code_1() -> None:
    done = processes.clae("parity", "data.image_size=16", "model.norm=local", "--world-size", "2", "--steps", "1")
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "model.norm=global makes them the same" in done.stdout


def test_the_command_says_what_cannot_be() -> None:
    done = processes.clae("parity", "--world-size", "0")
    assert done.returncode == 2
    assert "--world-size is 0; use at least 1." in done.stderr
