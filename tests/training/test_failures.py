"""Failures of one rank end all ranks with one message, and leave what was saved."""

from __future__ import annotations

import io
import json
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.config import Batch, Config, Model
from clae_dist.data.loader import LoadedBatch as ViewBatch
from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import CheckpointError, ConfigError, DataError, RankError
from clae_dist.recipe import Recipe
from clae_dist.runs.folder import RunFolder
from clae_dist.training import train as training
from clae_dist.world import World
from tests.parallel.expected_steps import largest_difference
from tests.ranks import RankPool
from tests.training.disturbed import BARE, assert_bitwise, final, logged, recipe, train_on


def outcome(world: World, config: Config, action: str = "") -> tuple[str, str]:
    """The type and text of what train() raises on this rank."""
    if action == "one rank's loss is not finite":
        real = training.pretrain_step

        def step(run: Any, batch: Any, moment: Any) -> Any:
            poison = torch.nan if world.rank == 1 else 1.0
            views = run.augment(batch)
            return real(replace(run, augment=lambda batch: (views[0] * poison, views[1])), batch, moment)

        training.pretrain_step = step
    load = training.load
    if action == "one rank's batch is short" and world.rank == 2:
        training.load = lambda *arguments: (
            ViewBatch(batch.views[:, :7], batch.draws[:, :7], batch.ids[:7], batch.labels[:7], {}) for batch in load(*arguments)
        )
    if action == "one rank's loader process dies":

        def dies(*arguments: Any) -> Any:
            yield from list(load(*arguments))[: 2 if world.rank == 1 else None]
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error")

        training.load = dies
    if action == "one gradient is not finite":
        real, count = training.pretrain_step, 0

        def broken(run: Any, batch: Any, moment: Any) -> Any:
            nonlocal count
            count += 1
            metrics = real(run, batch, moment)
            return replace(metrics, grad_norm=torch.tensor(torch.inf), taken=False) if count == 3 else metrics

        training.pretrain_step = broken
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if action == "the disk is full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a rank's file has more bytes, nothing else has
    try:
        training.train(Recipe(config), world, io.StringIO())
    except (RankError, CheckpointError, ConfigError, DataError) as error:
        return type(error).__name__, str(error)
    finally:
        training.load = load
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if action.endswith("not finite"):
            training.pretrain_step = real
    return "none", ""


def test_a_loader_process_that_dies_ends_all_ranks(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    found = ranks.run(3, outcome, recipe(shards, tmp_path / "run", **BARE), "one rank's loader process dies")
    assert len(set(found)) == 1
    assert found[0][0] == "DataError"
    assert "rank 1 cannot load its batch: RuntimeError: DataLoader worker (pid 7) is killed" in found[0][1]


def test_a_loss_that_is_not_finite_ends_all_ranks(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    config = replace(recipe(shards, tmp_path / "run", **BARE), model=Model(encoder="small_resnet", norm="local"))
    found = ranks.run(3, outcome, config, "one rank's loss is not finite")
    assert len(set(found)) == 1
    assert found[0][0] == "DivergedError"
    assert "the loss is not finite" in found[0][1]
    assert found[0][1].endswith("(on rank 1 of 3)")  # though every rank's loss is, with its rows among the negatives


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_never_saved(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    """The loss was finite: clipping then makes every weight a NaN, in the very step that is saved."""
    config = recipe(shards, tmp_path / "run")
    found = ranks.run(2, outcome, config, "one gradient is not finite")
    assert len(set(found)) == 1
    assert found[0][0] == "DivergedError"
    assert "the gradient of step 3 is not finite; this step was not saved" in found[0][1]
    assert RunFolder(config.folder).find_checkpoints() == []


@pytest.mark.slow
def test_a_rank_with_fewer_rows_ends_all_ranks(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    """A plain error rather than collectives that wait for ever."""
    found = ranks.run(3, outcome, recipe(shards, tmp_path / "run"), "one rank's batch is short")
    assert len(set(found)) == 1
    assert found[0][0] == "DataError"
    assert "rank 2's batch has 7 rows where every rank needs 8" in found[0][1]


@pytest.mark.slow
def test_a_full_disk_ends_all_ranks_and_leaves_the_old_checkpoint(
    ranks: RankPool, shards: Manifest, tmp_path: Path, finished_run: Callable[[int], Config]
) -> None:
    config = recipe(shards, tmp_path / "run")
    ranks.run(3, train_on, config, 5)
    found = ranks.run(3, outcome, config, "the disk is full")
    assert len(set(found)) == 1
    assert found[0][0] == "CheckpointError"
    assert "the checkpoint of step 6 could not be written" in found[0][1]
    assert re.search(r"rank 0: .* cannot be written: File too large", found[0][1])
    assert "step-00000003 is untouched" in found[0][1]
    assert [path.name for path in (config.folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert ranks.run(3, train_on, config) == ["finished"] * 3
    assert_bitwise(final(config), final(finished_run(3)))


def test_a_run_folder_of_another_configuration_is_refused(
    ranks: RankPool, shards: Manifest, finished_run: Callable[[int], Config]
) -> None:
    config = finished_run(2)
    other = replace(config, objective=replace(config.objective, temperature=0.1), train=replace(config.train, log_every=7))
    found = ranks.run(2, outcome, other)
    assert len(set(found)) == 1
    assert found[0][0] == "ConfigError"
    assert "belongs to another configuration: objective.temperature was 0.5 and is 0.1." in found[0][1]


def test_other_images_in_the_same_run_are_refused(
    ranks: RankPool, tmp_path: Path, finished_run: Callable[[int], Config]
) -> None:
    others = write_synthetic_set(tmp_path / "shards", 96, 16)
    config = replace(finished_run(2), data=replace(finished_run(2).data, shards=str(others.folder)))
    assert "the images were" in ranks.run(2, outcome, config)[0][1]


def test_a_changed_shard_ends_all_ranks_with_its_name(ranks: RankPool, tmp_path: Path) -> None:
    changed = write_synthetic_set(tmp_path / "shards", 100, 16, num_shards=3)
    path = changed.folder / changed.splits["train"][1].name
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    found = ranks.run(2, outcome, recipe(changed, tmp_path / "run"))
    assert len(set(found)) == 1
    assert found[0][0] == "DataError"
    assert "train-000001.tar has sha256" in found[0][1]


@pytest.fixture
def damaged(tmp_path: Path) -> Manifest:
    """A set with an image that is none any more: without a check of the checksums, only the rank that meets it can know."""
    found = write_synthetic_set(tmp_path / "damaged", 100, 16, num_shards=3)
    path = found.folder / found.splits["train"][1].name
    data = bytearray(path.read_bytes())
    offset = int(found.index(found.splits["train"][1])[3, 0])
    data[offset : offset + 8] = b"notaJPEG"
    path.write_bytes(data)
    return found


def test_an_image_that_one_rank_cannot_read_ends_all_ranks_with_its_name(
    ranks: RankPool, damaged: Manifest, tmp_path: Path
) -> None:
    config = recipe(damaged, tmp_path / "run", **BARE)
    found = ranks.run(3, outcome, replace(config, data=replace(config.data, verify="size")))
    assert len(set(found)) == 1
    assert found[0][0] == "DataError"
    assert "1 of 100 images cannot be decoded, more than the 0 that data.max_bad allows" in found[0][1]
    assert "sample 3 of train-000001.tar" in found[0][1]
    lines = (tmp_path / "run" / "bad-samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == ["sample 3 of train-000001.tar"]


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [1, 0.01])
def test_within_the_budget_another_image_stands_in_for_it_after_a_restart_too(
    ranks: RankPool, damaged: Manifest, tmp_path: Path, allowed: float
) -> None:
    ends = []
    for name, lose_at in (("undisturbed", 0), ("lost", 5)):
        config = recipe(damaged, tmp_path / name)
        config = replace(config, data=replace(config.data, verify="size", max_bad=allowed))
        if lose_at:
            assert ranks.run(2, train_on, config, lose_at) == ["lost", "lost"]
        assert ranks.run(2, train_on, config) == ["finished", "finished"]
        ends.append(final(config))
    assert_bitwise(*ends)
    assert list(ends[0]["bad_samples"]) == ["sample 3 of train-000001.tar"]
    assert [line["bad_samples"] for line in logged(config) if "bad_samples" in line][-1] == 1


def test_fewer_images_than_one_global_batch(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    config = replace(recipe(shards, tmp_path / "run"), batch=Batch(global_size=128))
    assert ranks.run(2, outcome, config)[1] == (
        "DataError",
        "the train split has 100 images, fewer than batch.global_size 128; use batch.global_size=64 or more images.",
    )


def test_a_batch_that_ranks_cannot_share(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    config = replace(recipe(shards, tmp_path / "run"), batch=Batch(global_size=32))
    assert ranks.run(3, outcome, config)[0] == (
        "ConfigError",
        "batch.global_size is 32, but 3 ranks need equal rows; try 30 or 33.",
    )


@pytest.mark.slow
def test_a_mixture_goes_on_on_other_ranks_and_is_evaluated_on_its_first_set(
    ranks: RankPool, shards: Manifest, tmp_path: Path
) -> None:
    other = write_synthetic_set(tmp_path / "other", 44, 20, num_shards=2)
    ends = []
    for name, lose_at in (("undisturbed", 0), ("lost", 5)):
        config = recipe(shards, tmp_path / name, precision="float64")
        config = replace(
            config, data=replace(config.data, mixture={str(other.folder): 0.25}), train=replace(config.train, epochs=1.4)
        )
        if lose_at:
            assert ranks.run(4, train_on, config, lose_at) == ["lost"] * 4
        assert ranks.run(2, train_on, config) == ["finished", "finished"]
        ends.append(final(config))
    assert largest_difference(ends[1]["model"], ends[0]["model"]) < 1e-9  # 4 ranks, then 2
    assert any("knn_accuracy" in line for line in logged(config))
    changed = replace(config, data=replace(config.data, mixture={str(other.folder): 0.5}))
    kind, text = ranks.run(2, outcome, changed)[0]
    assert kind == "ConfigError"
    assert "digest of the manifest" in text
