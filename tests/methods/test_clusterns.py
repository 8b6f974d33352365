"""ClusterNS: its losses and gradients against a double loop, its clustering, and the centroids on any number of ranks.

# B rows on this rank, N rows on all ranks, C centroids, D embedding width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clae_dist.config import Attack, Batch, Config, Data, Objective, Optim, Train
from clae_dist.contrast.distributed import Contrast
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.step import pretrain_step
from clae_dist.errors import ConfigError
from clae_dist.methods.clusterns import ClusterNsSettings
from clae_dist.objectives.clusters import farthest_points, mean_similarity, moved
from clae_dist.parallel.ddp import DdpBackend
from clae_dist.world import World
from tests import steps
from tests.methods.test_supcon import unit_rows
from tests.networks import small_model
from tests.ranks import RankPool

N, TEMPERATURE, MARGIN = 6, 0.5, (0.1, 0.2)
STARTED = torch.tensor([True])
METHOD = ClusterNsSettings(clusters=3, start_similarity=1.0, rate=0.1, false_weight=0.5)


def double_loop(a: torch.Tensor, b: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The InfoNCE with hard negatives, and the margins, as two numbers."""
    unit = [centroid / centroid.norm() for centroid in centroids]
    near_to = [sorted(range(len(unit)), key=lambda c, row=row: -float(row @ unit[c])) for row in a.detach()]
    hard = [unit[order[1]] for order in near_to]
    loss = margins = torch.zeros((), dtype=a.dtype)
    for i in range(len(a)):
        columns = torch.stack([a[i] @ row / TEMPERATURE for row in [*b, *hard]])
        loss = loss + columns.logsumexp(0) - columns[i]
        for j in range(len(a)):
            if j != i and near_to[i][0] == near_to[j][0]:
                more = a[i] @ b[j] - a[i] @ b[i]
                margins = margins + (more + MARGIN[0]).relu() + (-more - MARGIN[1]).relu()
    return torch.stack([loss / len(a), margins / len(a) ** 2])


def values_and_gradients(world: World, started: torch.Tensor) -> Any:
    """Both global losses, and the gradients (2, N, D) of the sum as a backend averages them. Collective."""
    size = N // world.size
    mine = slice(world.rank * size, (world.rank + 1) * size)
    a, b = (unit_rows(seed, N)[mine].requires_grad_() for seed in (1, 2))
    contrast = Contrast(Objective(temperature=TEMPERATURE), world)
    losses = torch.stack(contrast.clusters(contrast.rows(a), contrast.rows(b), 3 * unit_rows(3, 3), started, MARGIN))
    losses.sum().backward()
    found = world.gather_objects((losses.detach(), torch.stack([a.grad, b.grad]) / world.size))  # type: ignore[list-item]
    return torch.stack([values for values, _ in found]).mean(0), torch.cat([gradients for _, gradients in found], 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_values_and_gradients_are_those_of_a_double_loop(ranks: RankPool, world_size: int) -> None:
    a, b = (unit_rows(seed, N).requires_grad_() for seed in (1, 2))
    expected = double_loop(a, b, unit_rows(3, 3))
    assert (expected > 0.01).all()
    gradients = torch.stack(torch.autograd.grad(expected.sum(), (a, b)))
    for values, found in ranks.run(world_size, values_and_gradients, STARTED):
        torch.testing.assert_close(values, expected.detach(), atol=1e-12, rtol=0)
        torch.testing.assert_close(found, gradients, atol=1e-12, rtol=0)


def test_before_the_clustering_has_started_it_is_info_nce() -> None:
    (loss, margins), _ = values_and_gradients(World.single("cpu"), ~STARTED)
    expected = F.cross_entropy(unit_rows(1, N) @ unit_rows(2, N).T / TEMPERATURE, torch.arange(N))
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    assert margins == 0


def test_two_clusters_are_each_others_hard_negatives_and_margins_end_within_the_band() -> None:
    left, right = torch.eye(4, dtype=torch.float64)[:2]
    rows = torch.stack([left, left, right, right])
    contrast = Contrast(Objective(temperature=TEMPERATURE), World.single("cpu"))
    both = contrast.rows(rows)
    loss, margins = contrast.clusters(both, both, torch.stack([left, right]), STARTED, (0.0, 0.5))
    # Each anchor: two rows and two hard negatives at similarity 1, two and two at 0; the others' hard negatives are its own.
    expected = torch.tensor([2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0], dtype=torch.float64).logsumexp(0) - 2.0
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    assert margins == 0
    # A false negative must now be less similar than the positive by 0.3, in 4 of 16 pairs.
    _, margins = contrast.clusters(both, both, torch.stack([left, right]), STARTED, (0.3, 0.5))
    torch.testing.assert_close(margins, torch.tensor(0.3 * 4 / 16, dtype=torch.float64), atol=1e-12, rtol=0)


# ---- the clustering ----


def test_the_first_centroids_are_far_from_each_other() -> None:
    axes = torch.eye(3, dtype=torch.float64)
    rows = torch.stack([axes[0], axes[0], axes[1], -axes[0], axes[1]])
    torch.testing.assert_close(farthest_points(rows, 3), torch.stack([axes[0], -axes[0], axes[1]]))
    assert mean_similarity(axes) == 0
    torch.testing.assert_close(mean_similarity(axes[:1].expand(4, -1)), torch.tensor(1.0, dtype=torch.float64))


def test_a_centroid_moves_towards_the_sum_of_its_members_and_an_empty_one_stays() -> None:
    axes = torch.eye(3, dtype=torch.float64)
    found = moved(torch.stack([2 * axes[0], axes[1], -axes[2]]), torch.stack([axes[0], axes[0], axes[1]]), 0.1)
    expected = torch.stack([0.9 * 2 * axes[0] + 0.1 * 2 * axes[0], axes[1], -axes[2]])
    torch.testing.assert_close(found, expected, atol=1e-15, rtol=0)


def centroids_after(world: World, method: ClusterNsSettings) -> Any:
    config = Config(
        data=Data(image_size=8),
        batch=Batch(global_size=N),
        method=method,
        optim=Optim(name="sgd", learning_rate=0.1, scaling="none", warmup_epochs=0),
        train=Train(precision="float64"),
    )
    backend = DdpBackend(config, small_model("batch", 3, world.group), world)
    backend.model.train()
    run = steps.pretraining(config, world, backend)
    terms = []
    for step in range(3):
        views = tuple(steps.share(world, steps.images(2 * step + view, N, 8)) for view in (0, 1))
        terms.append(pretrain_step(run, views, Moment(step)).terms)
    return dict(run.state), terms


@pytest.mark.parametrize("world_size", [2, 3])
def test_centroids_are_the_same_on_any_number_of_ranks(ranks: RankPool, world_size: int) -> None:
    alone, terms = centroids_after(World.single("cpu"), METHOD)
    assert alone["started"]
    assert terms[0]["false_negatives"] == 0 < terms[2]["false_negatives"]
    for found, _ in ranks.run(world_size, centroids_after, METHOD):
        torch.testing.assert_close(found["centroids"], alone["centroids"], atol=1e-10, rtol=0)


def test_similar_embeddings_wait_for_the_clustering() -> None:
    state, terms = centroids_after(World.single("cpu"), replace(METHOD, start_similarity=-1.0, false_weight=0.0))
    assert not state["started"]
    assert not state["centroids"].any()
    assert list(terms[0]) == ["clean"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"clusters": 13}, "method.clusters is 13.*batch.global_size is 12; use at most 12"),
        ({"near": 0.6}, "method.near is 0.6; method.far is 0.5; use near <= far"),
        ({"rate": 0.0}, "method.rate is 0"),
        ({"clusters": 1}, "method.clusters is 1"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(batch=Batch(global_size=12), method=ClusterNsSettings(**{"clusters": 4, **settings}), attack=Attack())
