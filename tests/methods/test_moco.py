"""MoCo: its loss against a double loop, its key encoder, its queue, and a lost run.

# B rows on this rank, N rows of the global batch, K rows of the queue, D embedding width.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clae_dist.config import (
    Attack,
    Batch,
    Checkpointing,
    Config,
    Data,
    MethodSettings,
    Model,
    Objective,
    Optim,
    Parallel,
    Train,
)
from clae_dist.contrast.distributed import Contrast
from clae_dist.contrast.encoding import TrainingEncoding
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.step import pretrain_step
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import ConfigError
from clae_dist.methods.moco import MoCo, MoCoSettings
from clae_dist.models import build_model
from clae_dist.objectives.form import Rows
from clae_dist.parallel import make_backend
from clae_dist.parallel.ddp import DdpBackend
from clae_dist.runs.checkpoint import load_checkpoint
from clae_dist.world import World
from tests import steps
from tests.networks import small_model
from tests.ranks import RankPool
from tests.small_run import small_run
from tests.training.disturbed import train_on

N, SIDE, TEMPERATURE = 12, 8, 0.2
METHOD = MoCoSettings(alpha=0.7, momentum=0.9, queue=24)
CONFIG = Config(
    data=Data(image_size=SIDE),
    batch=Batch(global_size=N),
    method=METHOD,
    objective=Objective(temperature=TEMPERATURE),
    attack=Attack(epsilon=0.03),
    optim=Optim(name="sgd", learning_rate=0.1, scaling="none", warmup_epochs=0),
    train=Train(precision="float64"),
)


def unit_rows(seed: int, count: int, dim: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)


def double_loop(
    queries: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor, chosen: list[int], *, with_batch: bool
) -> float:
    total = 0.0
    for query, image in zip(queries, chosen, strict=True):
        positive = math.exp(float(query @ keys[image]) / TEMPERATURE)
        mass = positive + sum(math.exp(float(query @ row) / TEMPERATURE) for row in queue)
        if with_batch:
            mass += sum(math.exp(float(query @ row) / TEMPERATURE) for other, row in enumerate(keys) if other != image)
        total -= math.log(positive / mass)
    return total / len(chosen)


@pytest.mark.parametrize("with_batch", [True, False])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [1, 3]])
def test_the_loss_is_that_of_a_double_loop(chosen: list[int], with_batch: bool) -> None:
    keys, queue = unit_rows(1, 4), unit_rows(2, 7)
    queries = unit_rows(3, len(chosen)).requires_grad_()
    contrast = Contrast(CONFIG.objective, World.single("cpu"))
    constant = Rows(keys.clone().requires_grad_(), keys.clone().requires_grad_())
    loss = contrast.match(queries, constant, queue, with_batch=with_batch, index=torch.tensor(chosen))
    assert float(loss.detach()) == pytest.approx(
        double_loop(queries.detach(), keys, queue, chosen, with_batch=with_batch), abs=1e-12
    )
    loss.backward()
    assert queries.grad is not None
    assert constant.mine.grad is None
    assert constant.all.grad is None


def test_without_a_queue_it_is_instance_discrimination_with_constant_columns() -> None:
    keys, queries = unit_rows(1, 6), unit_rows(2, 6)
    contrast = Contrast(CONFIG.objective, World.single("cpu"))
    loss = contrast.match(queries, Rows(keys, keys), None, with_batch=True, index=slice(None))
    torch.testing.assert_close(loss, F.cross_entropy(queries @ keys.T / TEMPERATURE, torch.arange(6)), atol=1e-12, rtol=0)


# ---- the key encoder ----


def trained(world: World, config: Config, count: int = 3) -> dict[str, Any]:
    """Weights after each step, the key encoder, the queue, and the keys of the last step's images."""
    backend = DdpBackend(config, small_model("batch", 3, world.group), world)
    backend.model.train()
    run = steps.pretraining(config, world, backend)
    weights = [backend.weights()]
    keys = []
    for step in range(count):
        x, y = (steps.share(world, steps.images(2 * step + view, N, SIDE)) for view in (0, 1))
        keys.append(run.contrast.rows(run.encoding.keys(y, "clean")).all.clone())
        pretrain_step(run, (x, y), Moment(step))
        weights.append(backend.weights())
    return {"weights": weights, "average": backend.key_weights(), "queue": run.state.get("queue"), "keys": keys}


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_key_encoder_is_the_average_of_weights_and_running_statistics(momentum: float) -> None:
    found = trained(World.single("cpu"), replace(CONFIG, method=replace(METHOD, momentum=momentum)))
    first, *later = found["weights"]
    if not momentum:
        assert found["average"] == {}
        return
    assert {"encoder.conv.weight", "encoder.norm.clean.running_mean"} <= set(found["average"])
    for name, value in found["average"].items():
        expected = first[name]
        for weights in later:
            expected = momentum * expected + (1 - momentum) * weights[name]
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
        assert not torch.equal(value, later[-1][name]) or "adversarial" in name


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_key_depends_on_its_own_image_alone_and_changes_nothing(momentum: float) -> None:
    """EMAN: no batch statistics, which would tell a query which key is of its batch."""
    world = World.single("cpu")
    backend = DdpBackend(replace(CONFIG, method=replace(METHOD, momentum=momentum)), small_model("batch", 3), world)
    backend.model.train()
    before = backend.weights()
    images = steps.images(5, 6, SIDE)
    encoding = TrainingEncoding(backend)
    together = encoding.keys(images, "clean")
    torch.testing.assert_close(encoding.keys(images[:2], "clean"), together[:2], atol=1e-14, rtol=0)
    assert not together.requires_grad
    assert backend.model.training
    assert all(torch.equal(value, before[name]) for name, value in backend.weights().items())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_queue_holds_the_last_keys_in_global_order(ranks: RankPool, world_size: int) -> None:
    alone = trained(World.single("cpu"), CONFIG)
    assert torch.equal(alone["queue"], torch.cat([alone["keys"][2], alone["keys"][1]]))
    for found in ranks.run(world_size, trained, CONFIG):
        torch.testing.assert_close(found["queue"], alone["queue"], atol=1e-10, rtol=0)
        for name, value in alone["average"].items():
            torch.testing.assert_close(found["average"][name], value, atol=1e-10, rtol=0)


# ---- the attack ----


def input_gradient(x: torch.Tensor, y: torch.Tensor, method: MoCoSettings) -> torch.Tensor:
    """∂ of the attack's loss in x, without batch statistics."""
    config = replace(CONFIG, method=method)
    backend = DdpBackend(config, small_model("group", 3), World.single("cpu"))
    backend.model.train()
    run = steps.pretraining(config, World.single("cpu"), backend)
    from clae_dist.contrast.look import look

    (attacked,) = look(run, (x, y), x, y).attacks
    return attacked.found.gradient


@pytest.mark.parametrize("include_batch", [True, False])
def test_only_the_keys_of_the_batch_tie_images_together(include_batch: bool) -> None:
    method = replace(METHOD, include_batch=include_batch)
    x, y, other = steps.images(1, 4, SIDE), steps.images(2, 4, SIDE), steps.images(3, 4, SIDE)
    first = input_gradient(x, y, method)[0]
    assert first.abs().max() > 0, "the positive has a gradient at x: its key is of another view and another network"
    torch.testing.assert_close(input_gradient(torch.cat([x[:1], other[1:]]), y, method)[0], first, atol=1e-15, rtol=1e-12)
    moved = input_gradient(x, torch.cat([y[:1], other[1:]]), method)[0]
    assert torch.allclose(moved, first, atol=1e-15, rtol=1e-12) != include_batch


# ---- a run ----


def keys_loaded(world: World, config: Config) -> dict[str, torch.Tensor]:
    """The key encoder of a new backend that has loaded the newest checkpoint."""
    backend = make_backend(config, build_model(config, world.group), world)
    checkpoint = load_checkpoint(config.folder, pytest.fail, world)
    assert checkpoint is not None
    backend.load_state(checkpoint.state())
    return {**backend.key_weights(), "queue": backend.method_state["queue"]}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_a_lost_run_resumes_bit_for_bit_and_on_other_ranks(ranks: RankPool, tmp_path: Path, backend: Any) -> None:
    shards = write_synthetic_set(tmp_path / "shards", 72, 16)  # an epoch is 3 steps

    def config(name: str) -> Config:
        train = Train(epochs=1, precision="float64", threads=1, knn_every=0, diagnose_every=3)
        method = replace(METHOD, queue=48)
        more = {"method": method, "train": train, "checkpoint": Checkpointing(every_steps=2)}
        return small_run(shards.folder, tmp_path / name, **more, parallel=Parallel(backend=backend))

    undisturbed, lost = config("undisturbed"), config("lost")
    assert ranks.run(2, train_on, undisturbed) == ["finished"] * 2
    assert ranks.run(2, train_on, lost, 3) == ["lost"] * 2
    moved = config("moved")  # to another number of ranks
    shutil.copytree(lost.folder, moved.folder)
    assert ranks.run(2, train_on, lost) == ["finished"] * 2
    checkpoints = [load_checkpoint(run.folder, pytest.fail) for run in (undisturbed, lost)]
    one, other = (checkpoint.state() for checkpoint in checkpoints if checkpoint is not None)
    for section in ("model", "keys", "method"):
        assert all(torch.equal(value, other[section][name]) for name, value in one[section].items()), section
    for world_size in (1, 3):
        for found in ranks.run(world_size, keys_loaded, lost):
            assert torch.equal(found.pop("queue"), one["method"]["queue"])
            assert all(torch.equal(value, one["keys"][name]) for name, value in found.items())
            assert set(found) == set(one["keys"])
    assert ranks.run(3, train_on, moved) == ["finished"] * 3
    for found in ranks.run(3, keys_loaded, moved):
        torch.testing.assert_close(found, {**one["keys"], "queue": one["method"]["queue"]}, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("method", "more", "words"),
    [
        (replace(METHOD, queue=30), {}, "method.queue is 30, which batch.global_size 12 does not divide; try 24"),
        (replace(METHOD, queue=0, include_batch=False), {}, "there would be no negatives"),
        (METHOD, {"model": Model(norm="local")}, "model.norm is 'local'.*nothing leaks"),
        (METHOD, {"objective": Objective(name="uel")}, "objective.name is 'uel', but method.name=moco has a loss of its own"),
    ],
)
def test_settings_that_are_refused(method: MethodSettings, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(CONFIG, method=method, **more)


def test_the_start_of_the_queue_is_a_function_of_the_seed() -> None:
    method = MoCo(METHOD)
    assert torch.equal(method.state(6, 1)["queue"], method.state(6, 1)["queue"])
    assert not torch.equal(method.state(6, 1)["queue"], method.state(6, 2)["queue"])
    assert MoCo(replace(METHOD, queue=0)).state(6, 1) == {}
