"""DSCL: its loss and gradients against a double loop, its limits, its queue of labels, and its refusals.

# B rows on this rank, N rows on all ranks, K rows of the queue, D embedding width.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clae_dist.config import Batch, Checkpointing, Config, Objective, Parallel, Train
from clae_dist.contrast.distributed import Contrast
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import ConfigError
from clae_dist.methods.dscl import Dscl, DsclSettings
from clae_dist.objectives.form import UNWRITTEN
from clae_dist.runs.checkpoint import load_checkpoint
from clae_dist.world import World
from tests.methods.test_supcon import unit_rows
from tests.ranks import RankPool
from tests.small_run import small_run
from tests.training.disturbed import train_on

TEMPERATURE = 0.5
LABELS = [2, 0, 2, -1, 1, 3]
QUEUE_LABELS = [0, 2, UNWRITTEN, -1, 1, UNWRITTEN, 2]


def double_loop(
    queries: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor, others: float, labels: tuple[list[int], list[int]]
) -> torch.Tensor:
    """The mean over queries of -Σ w_t log p_t / Σ w: 1 for the own key, β / (|P| - 1) for each other positive."""
    of_batch, of_queue = labels
    total = torch.zeros((), dtype=queries.dtype)
    for i, query in enumerate(queries):
        columns = [(row, of_batch[j], False) for j, row in enumerate(queries) if j != i]
        columns += [(row, of_batch[j], j == i) for j, row in enumerate(keys)]
        columns += [(row, of_queue[j], False) for j, row in enumerate(queue) if of_queue[j] != UNWRITTEN]
        similar = torch.stack([query @ row / TEMPERATURE for row, _, _ in columns])
        log_p = similar - similar.logsumexp(0)
        positives = [n for n, (_, label, own) in enumerate(columns) if not own and label == of_batch[i] >= 0]
        weights = {n: others / len(positives) for n in positives}
        weights |= {n: 1.0 for n, (_, _, own) in enumerate(columns) if own}
        total = total - sum(weight * log_p[n] for n, weight in weights.items()) / sum(weights.values())
    return total / len(queries)


def value_and_gradient(world: World, others: float, labels: list[int], of_queue: list[int]) -> Any:
    """The global loss, and the gradient (N, D) of all queries as a backend averages it. Collective."""
    size = len(labels) // world.size
    mine = slice(world.rank * size, (world.rank + 1) * size)
    queries = unit_rows(1, len(labels))[mine].requires_grad_()
    keys = unit_rows(2, len(labels))[mine].requires_grad_()
    contrast = Contrast(Objective(temperature=TEMPERATURE), world)
    queue = unit_rows(3, len(of_queue)), torch.tensor(of_queue, dtype=torch.int64)
    loss = contrast.match_groups(contrast.rows(queries), contrast.rows(keys), torch.tensor(labels), queue, others)
    loss.backward()
    assert keys.grad is None
    assert queries.grad is not None
    found = world.gather_objects((loss.detach(), queries.grad / world.size))
    return torch.stack([value for value, _ in found]).mean(), torch.cat([gradient for _, gradient in found])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_value_and_gradient_are_those_of_a_double_loop(ranks: RankPool, world_size: int) -> None:
    queries = unit_rows(1, 6).requires_grad_()
    expected = double_loop(queries, unit_rows(2, 6), unit_rows(3, 7), 8.0, (LABELS, QUEUE_LABELS))
    (gradient,) = torch.autograd.grad(expected, queries)
    for value, found in ranks.run(world_size, value_and_gradient, 8.0, LABELS, QUEUE_LABELS):
        torch.testing.assert_close(value, expected.detach(), atol=1e-12, rtol=0)
        torch.testing.assert_close(found, gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("others", "labels"), [(0.0, LABELS), (8.0, [0, 1, 2, 3, 4, 5]), (8.0, [-1] * 6)])
def test_without_others_it_is_info_nce(others: float, labels: list[int]) -> None:
    value, _ = value_and_gradient(World.single("cpu"), others, labels, [9, UNWRITTEN, 8])
    queries, keys, queue = unit_rows(1, 6), unit_rows(2, 6), unit_rows(3, 3)[[0, 2]]
    among = (queries @ queries.T).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf)
    logits = torch.cat([queries @ keys.T, among, queries @ queue.T], 1) / TEMPERATURE
    torch.testing.assert_close(value, F.cross_entropy(logits, torch.arange(6)), atol=1e-12, rtol=0)


def test_with_as_much_weight_as_others_it_is_supcon_of_the_queries() -> None:
    labels, of_queue = [0, 1] * 3, [0, 1] * 2  # every query has 2 + 2 + 2 others
    value, _ = value_and_gradient(World.single("cpu"), 6.0, labels, of_queue)
    queries = unit_rows(1, 6)
    columns, groups = torch.cat([queries, unit_rows(2, 6), unit_rows(3, 4)]), torch.tensor([*labels, *labels, *of_queue])
    similar = (queries @ columns.T / TEMPERATURE).masked_fill(torch.eye(6, 16, dtype=torch.bool), -torch.inf)
    positive = (groups[:6, None] == groups) & ~torch.eye(6, 16, dtype=torch.bool)
    expected = -(similar - similar.logsumexp(1, keepdim=True))[positive].view(6, 7).mean()
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)


def test_unwritten_rows_of_the_queue_have_no_influence() -> None:
    """The authors' queue starts with random labels, whose rows are false positives."""
    written = [n for n, label in enumerate(QUEUE_LABELS) if label != UNWRITTEN]
    queries, keys, queue = unit_rows(1, 6), unit_rows(2, 6), unit_rows(3, 7)
    short = double_loop(queries, keys, queue[written], 8.0, (LABELS, [QUEUE_LABELS[n] for n in written]))
    value, _ = value_and_gradient(World.single("cpu"), 8.0, LABELS, QUEUE_LABELS)
    torch.testing.assert_close(value, short, atol=1e-12, rtol=0)
    assert (Dscl(DsclSettings(queue=12)).state(4, 0)["labels"] == UNWRITTEN).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"queue": 0}, "method.queue is 0, but method.name=dscl needs one; try 12"),
        ({"queue": 30}, "method.queue is 30, which batch.global_size 12 does not divide; try 24"),
        ({"others": -1.0}, "method.others is -1"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(batch=Batch(global_size=12), method=DsclSettings(**settings))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_a_lost_run_on_a_long_tail_resumes_bit_for_bit(ranks: RankPool, tmp_path: Path, backend: Any) -> None:
    shards = write_synthetic_set(tmp_path / "shards", 144, 16)

    def config(name: str) -> Config:
        more = {
            "method": DsclSettings(queue=48),
            "train": Train(epochs=1, precision="float64", threads=1, knn_every=0, diagnose_every=3),
            "checkpoint": Checkpointing(every_steps=2),
            "parallel": Parallel(backend=backend),
        }
        made = small_run(shards.folder, tmp_path / name, **more)
        return replace(made, data=replace(made.data, long_tail=3.0))

    undisturbed, lost = config("undisturbed"), config("lost")
    assert ranks.run(2, train_on, undisturbed) == ["finished"] * 2
    assert ranks.run(2, train_on, lost, 3) == ["lost"] * 2
    assert ranks.run(2, train_on, lost) == ["finished"] * 2
    checkpoints = [load_checkpoint(run.folder, pytest.fail) for run in (undisturbed, lost)]
    one, other = (checkpoint.state() for checkpoint in checkpoints if checkpoint is not None)
    for section in ("model", "keys", "method"):
        assert all(torch.equal(value, other[section][name]) for name, value in one[section].items()), section
    assert (one["method"]["labels"] >= 0).any()
