"""The state of a method: equal for every number of ranks, unchanged by a skipped step, saved and restored bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clae_dist.config import Attack, Batch, Checkpointing, Config, Data, Optim, Parallel, Train
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.step import NonFinite, pretrain_step
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.models import build_model
from clae_dist.parallel import make_backend
from clae_dist.parallel.ddp import DdpBackend
from clae_dist.runs.checkpoint import load_checkpoint
from clae_dist.world import World
from tests import steps
from tests.methods.queued import Queued, QueuedSettings
from tests.networks import small_model
from tests.ranks import RankPool
from tests.small_run import small_run
from tests.training.disturbed import train_on

N, SIDE, ROWS = 12, 8, 18
METHOD = QueuedSettings(name="tests.methods.queued:Queued", size=ROWS)
CONFIG = Config(
    data=Data(image_size=SIDE),
    batch=Batch(global_size=N),
    method=METHOD,
    attack=Attack(epsilon=0.03),
    optim=Optim(name="sgd", warmup_epochs=0),
    train=Train(precision="float64"),
)


def queue_and_keys(world: World, broken: int = -1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The queue after each of 3 steps, and the keys of all ranks in that step; the images of step `broken` are NaN."""
    backend = DdpBackend(CONFIG, small_model("batch", 3, world.group), world)
    backend.model.train()
    run = steps.pretraining(CONFIG, world, backend)
    seen = []
    for step in range(3):
        x, y = (steps.share(world, steps.images(2 * step + view, N, SIDE)) for view in (0, 1))
        with backend.untouched():
            keys = run.contrast.rows(run.encoding.constant(y, "clean")).all
        try:
            pretrain_step(run, (x * torch.nan if step == broken else x, y), Moment(step))
        except NonFinite:
            backend.discard()
        seen.append((run.state["queue"].clone(), keys))
    return seen


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_queue_holds_the_last_keys_in_the_order_of_the_global_batch(ranks: RankPool, world_size: int) -> None:
    """Gathered in another order, or written by one rank alone, the queue would not be that of one process."""
    alone = queue_and_keys(World.single(torch.device("cpu")))
    (first, _), (second, _), (third, _) = alone
    keys = [row for _, rows in alone for row in rows]
    for queue, count in ((first, 12), (second, 24), (third, 36)):
        for number in range(max(0, count - ROWS), count):
            assert torch.equal(queue[number % ROWS], keys[number])
    for found in ranks.run(world_size, queue_and_keys):
        for (queue, _), (wanted, _) in zip(found, alone, strict=True):
            torch.testing.assert_close(queue, wanted, atol=1e-10, rtol=0)


def test_a_skipped_step_leaves_the_queue_as_it_was(ranks: RankPool) -> None:
    for found in ranks.run(2, queue_and_keys, 1):
        (first, _), (second, _), (third, _) = found
        assert torch.equal(first, second)
        assert not torch.equal(second, third)


def loaded(world: World, config: Config) -> torch.Tensor:
    """The queue of a new backend that has loaded the newest checkpoint."""
    backend = make_backend(config, build_model(config, world.group), world)
    checkpoint = load_checkpoint(config.folder, lambda text: pytest.fail(text), world)
    assert checkpoint is not None
    backend.load_state(checkpoint.state())
    return backend.method_state["queue"]


@pytest.mark.parametrize("backend", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_lost_run_resumes_with_its_queue_bit_for_bit(ranks: RankPool, tmp_path: Path, backend: str) -> None:
    shards = write_synthetic_set(tmp_path / "shards", 72, 16)  # an epoch is 3 steps

    def config(name: str) -> Config:
        train = Train(epochs=1, precision="float64", threads=1, knn_every=0, diagnose_every=3)
        more = {"method": METHOD, "train": train, "checkpoint": Checkpointing(every_steps=2)}
        return small_run(shards.folder, tmp_path / name, **more, parallel=Parallel(backend=backend))

    undisturbed, lost = config("undisturbed"), config("lost")
    assert ranks.run(2, train_on, undisturbed) == ["finished"] * 2
    assert ranks.run(2, train_on, lost, 3) == ["lost"] * 2
    assert ranks.run(2, train_on, lost) == ["finished"] * 2
    states = [load_checkpoint(run.folder, lambda text: pytest.fail(text)) for run in (undisturbed, lost)]
    queues = []
    for checkpoint in states:
        assert checkpoint is not None
        queues.append(checkpoint.state()["method"]["queue"])
    assert torch.equal(*queues)
    assert not torch.equal(queues[0], Queued(METHOD).state(16, 0)["queue"].double())
    for world_size in (1, 3):
        assert all(torch.equal(queue, queues[0]) for queue in ranks.run(world_size, loaded, lost))
