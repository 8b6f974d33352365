"""SupCon: its loss and gradients against a double loop, its limits, and sets without labels.

# B rows on this rank, N rows on all ranks, D embedding width.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clae_dist.config import Config, Objective
from clae_dist.contrast.distributed import Contrast
from clae_dist.data.manifest import load_manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import ConfigError, DataError
from clae_dist.methods.supcon import SupConSettings
from clae_dist.training.sets import check_sets
from clae_dist.world import World
from tests.methods.attacked import nt_xent
from tests.ranks import RankPool

TEMPERATURE = 0.5
LABELS = [2, 0, 2, -1, 1, 0, 2, -1, 1, 1, 0, 2]


def unit_rows(seed: int, count: int = len(LABELS), dim: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)


def double_loop(a: torch.Tensor, b: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """Khosla et al. 2020, equation 2: the mean over the 2N anchors."""
    z, count = torch.cat([a, b]), len(a)
    total = torch.zeros((), dtype=z.dtype)
    for i in range(2 * count):
        others = [k for k in range(2 * count) if k != i]
        log_mass = torch.stack([z[i] @ z[k] / TEMPERATURE for k in others]).logsumexp(0)
        label = labels[i % count]
        positives = [k for k in others if k % count == i % count or labels[k % count] == label >= 0]
        total = total - torch.stack([z[i] @ z[k] / TEMPERATURE - log_mass for k in positives]).mean()
    return total / (2 * count)


def value_and_gradients(world: World, labels: list[int], gather: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The global loss, and the gradients (2, N, D) of all rows as a backend averages them. Collective."""
    size = len(labels) // world.size
    mine = slice(world.rank * size, (world.rank + 1) * size)
    a, b = (unit_rows(seed, len(labels))[mine].requires_grad_() for seed in (1, 2))
    contrast = Contrast(Objective(temperature=TEMPERATURE, gather=gather), world)  # type: ignore[arg-type]
    rows = contrast.rows(a), contrast.rows(b)
    loss = contrast(*rows) + contrast.spread_positives(*rows, torch.tensor(labels)[mine])
    loss.backward()
    found = world.gather_objects((loss.detach(), torch.stack([a.grad, b.grad]) / world.size))  # type: ignore[list-item]
    return torch.stack([value for value, _ in found]).mean(), torch.cat([gradient for _, gradient in found], 1)


@pytest.mark.parametrize("gather", ["log_sum_exp", "reduce_scatter"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_value_and_gradients_are_those_of_a_double_loop(ranks: RankPool, world_size: int, gather: str) -> None:
    a, b = (unit_rows(seed).requires_grad_() for seed in (1, 2))
    expected = double_loop(a, b, LABELS)
    gradients = torch.stack(torch.autograd.grad(expected, (a, b)))
    for value, found in ranks.run(world_size, value_and_gradients, LABELS, gather):
        torch.testing.assert_close(value, expected.detach(), atol=1e-12, rtol=0)
        torch.testing.assert_close(found, gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("labels", [[-1] * 6, [3, 1, 0, 2, 5, 4]])
def test_one_image_a_class_is_nt_xent(labels: list[int]) -> None:
    value, _ = value_and_gradients(World.single("cpu"), labels, "log_sum_exp")
    a, b = unit_rows(1, 6), unit_rows(2, 6)
    torch.testing.assert_close(value, nt_xent(a, b), atol=1e-12, rtol=0)


def test_the_order_of_images_and_the_names_of_classes_change_nothing() -> None:
    a, b = unit_rows(1), unit_rows(2)
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))
    renamed = [(label + 1) % 3 if label >= 0 else -1 for label in LABELS]
    moved = double_loop(b[order], a[order], [renamed[i] for i in order])
    value, _ = value_and_gradients(World.single("cpu"), LABELS, "log_sum_exp")
    torch.testing.assert_close(value, moved, atol=1e-12, rtol=0)


def test_a_set_without_labels_is_refused_before_the_first_step(tmp_path: Path) -> None:
    folder = write_synthetic_set(tmp_path / "shards", 72, 16).folder
    config = Config(method=SupConSettings())
    config = replace(config, data=replace(config.data, shards=str(folder)), batch=replace(config.batch, global_size=12))
    assert check_sets(config) is not None
    manifest = load_manifest(folder)
    unlabelled = replace(manifest, class_counts={split: (0,) * len(manifest.classes) for split in manifest.splits})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clae_dist.training.sets.open_shards", lambda data: unlabelled)
        with pytest.raises(DataError, match=r"method.name=supcon needs labels, but no image of split 'train' of .*shards has"):
            check_sets(config)


def test_another_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="objective.name is 'hard', but method.name=supcon has a loss of its own"):
        Config(method=SupConSettings(), objective=Objective(name="hard"))
