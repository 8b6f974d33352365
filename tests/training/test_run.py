"""Whole runs on real gloo ranks: resuming, stopping, failing together. All weights are compared bit for bit."""

from __future__ import annotations

import io
import json
import re
import resource
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.config import Batch, Checkpointing, Config, Model, Optim, Train
from clae_dist.data.loader import LoadedBatch as ViewBatch
from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import CheckpointError, ConfigError, DataError, RankError
from clae_dist.methods.clae import Clae
from clae_dist.recipe import Recipe
from clae_dist.runs.checkpoint import Writer, load_checkpoint, load_model
from clae_dist.runs.folder import STOP_FILE, RunFolder
from clae_dist.training import journal
from clae_dist.training import train as training
from clae_dist.training.saving import Saving
from clae_dist.world import World
from tests.parallel.expected_steps import largest_difference
from tests.ranks import RankPool
from tests.small_run import small_run

STEPS = 8  # two epochs of 100 images in batches of 24


def recipe(shards: Manifest, run_dir: Path, precision: str = "float32", **train: Any) -> Config:
    return small_run(
        shards.folder,
        run_dir,
        optim=Optim(name="adamw", learning_rate=1e-3, scaling="none", warmup_epochs=0.5),
        train=Train(
            **{
                "epochs": 2,
                "precision": precision,
                "log_every": 1,
                "diagnose_every": 3,
                "knn_every": 1,
                "threads": 1,
                **train,
            }
        ),
        checkpoint=Checkpointing(every_steps=3),
    )


def train_on(world: World, config: Config, lose_at: int = 0, stop_at: int = 0) -> str:
    """Trains; at step `lose_at` every rank fails as if the machine were lost (a half-written checkpoint is left behind).

    In step `stop_at` the launcher asks to stop.
    """
    real = training.pretrain_step
    count = 0

    def step(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == lose_at:
            (config.folder / "checkpoints" / "step-00000099.partial-12345678").mkdir(exist_ok=True)
            raise InterruptedError("lost")
        if count == stop_at:
            (config.folder / STOP_FILE).touch()
        return real(*arguments)

    training.pretrain_step = step
    flags = Saving.flags
    Saving.flags = _after_writing  # type: ignore[method-assign]
    try:
        return training.train(Recipe(config), world, io.StringIO()).status
    except InterruptedError:
        return "lost"
    finally:
        training.pretrain_step = real
        Saving.flags = flags  # type: ignore[method-assign]


_FLAGS = Saving.flags


def _after_writing(saving: Saving) -> tuple[bool, bool, bool]:
    """The flags of a rank whose writes take less than a step: what a lost run has saved does not depend on time."""
    saving._writer.join()
    return _FLAGS(saving)


def final(config: Config) -> dict[str, Any]:
    """The tensors of the last checkpoint, and what else it holds."""
    checkpoint = load_checkpoint(config.folder, lambda text: pytest.fail(text))
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    assert [path for path in (config.folder / "checkpoints").iterdir() if "partial" in path.name] == []
    info = dict(checkpoint.info)
    assert info.pop("train_s") > 0
    state = checkpoint.state()
    optimizer = {name: dict(entries) for name, entries in state["optimizer"].items()}
    return {**info, "model": dict(state["model"]), "optimizer": optimizer}


def assert_bitwise(found: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_bitwise(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        for a, b in zip(found, wanted, strict=True):
            assert_bitwise(a, b)
    else:
        assert found == wanted


def logged(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(ranks: RankPool, shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Config]:
    """The configuration of a run that nothing disturbed, by world size."""
    done: dict[int, Config] = {}

    def of(world_size: int) -> Config:
        if world_size not in done:
            config = recipe(shards, tmp_path_factory.mktemp("undisturbed") / "run")
            assert ranks.run(world_size, train_on, config) == ["finished"] * world_size
            done[world_size] = config
        return done[world_size]

    return of


@pytest.mark.parametrize("world_size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_lost_run_goes_on_to_the_same_bits(
    ranks: RankPool, shards: Manifest, tmp_path: Path, undisturbed: Callable[[int], Config], world_size: int
) -> None:
    """Three ranks: where DDP put a gradient in its buckets decides the last bit of a sum (parallel/ddp.py)."""
    config = recipe(shards, tmp_path / "run")
    assert ranks.run(world_size, train_on, config, 6) == ["lost"] * world_size
    assert [path.name for path in RunFolder(config.folder).find_checkpoints()] == ["step-00000003"]
    assert ranks.run(world_size, train_on, config) == ["finished"] * world_size
    assert_bitwise(final(config), final(undisturbed(world_size)))
    timeless = [
        [
            {key: value for key, value in line.items() if not key.endswith("_s") and key != "goodput" and "share" not in key}
            for line in logged(c)
        ]
        for c in (config, undisturbed(world_size))
    ]
    assert timeless[0] == timeless[1]  # what was logged after the checkpoint and lost is logged once


def test_a_stopped_run_goes_on_to_the_same_bits(
    ranks: RankPool, shards: Manifest, tmp_path: Path, undisturbed: Callable[[int], Config]
) -> None:
    config = recipe(shards, tmp_path / "run")
    assert ranks.run(3, train_on, config, 0, 2) == ["stopped"] * 3
    assert [path.name for path in RunFolder(config.folder).find_checkpoints()] == ["step-00000002"]
    (config.folder / STOP_FILE).unlink()
    assert ranks.run(3, train_on, config) == ["finished"] * 3
    assert_bitwise(final(config), final(undisturbed(3)))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    ranks: RankPool, shards: Manifest, tmp_path: Path, undisturbed: Callable[[int], Config]
) -> None:
    """Named with its file by one of two ranks, written anew, and as good as before. tests/runs has every kind of damage."""
    config = recipe(shards, tmp_path / "run")
    ranks.run(3, train_on, config, 8)
    newest, _ = RunFolder(config.folder).find_checkpoints()
    path = newest / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    said: list[str] = []
    checkpoint = load_checkpoint(config.folder, said.append)
    assert checkpoint is not None
    assert checkpoint.step == 3
    assert "step-00000006 is damaged: rank-00001.safetensors has sha256" in said[0]
    assert ranks.run(3, train_on, config) == ["finished"] * 3
    assert_bitwise(final(config), final(undisturbed(3)))


@pytest.mark.slow
def test_world_sizes_train_to_the_same_weights(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    """The same images, pixels, negatives and attack in every global batch: only the order of summation differs."""
    states = {}
    for world_size in (1, 2, 4):
        config = recipe(shards, tmp_path / f"run{world_size}", precision="float64", knn_every=0, diagnose_every=100)
        ranks.run(world_size, train_on, config)
        states[world_size] = final(config)["model"]
    for world_size in (2, 4):
        for name, value in states[1].items():
            torch.testing.assert_close(states[world_size][name], value, atol=1e-8, rtol=0)  # float64 over 8 steps of Adam


def test_what_is_logged(undisturbed: Callable[[int], Config]) -> None:
    lines = logged(undisturbed(3))
    assert [line["images_seen"] for line in lines if "loss" in line] == [24 * (i + 1) for i in range(STEPS)]
    measured = [line for line in lines if "wrong_sign_share" in line]
    assert [line["step"] for line in measured] == [1, 4, 7]
    for line in measured:
        assert 0 < line["wrong_sign_share"] < 100
        assert line["attack_loss_after"] > line["attack_loss_before"]
        assert 0 < line["delta_linf"] <= 4 / 255 + 1e-6
        assert line["cos_negative_hardest"] >= line["cos_negative_mean"]
        assert line["alignment"] == pytest.approx(2 - 2 * line["cos_positive"], abs=1e-5)  # float32
    assert [line["step"] for line in lines if "knn_accuracy" in line] == [0, 4, 8]
    assert all(
        line["knn_accuracy_low"] <= line["knn_accuracy"] <= line["knn_accuracy_high"]
        for line in lines
        if "knn_accuracy" in line
    )


@pytest.mark.slow
def test_diagnosing_changes_nothing(
    ranks: RankPool, shards: Manifest, tmp_path: Path, undisturbed: Callable[[int], Config]
) -> None:
    config = recipe(shards, tmp_path / "run", diagnose_every=1, knn_every=0.5, log_every=2)
    ranks.run(3, train_on, config)
    assert_bitwise(final(config)["model"], final(undisturbed(3))["model"])


def test_a_finished_run_says_so(ranks: RankPool, undisturbed: Callable[[int], Config]) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed(3).folder.rglob("*.safetensors")}
    assert before
    assert ranks.run(3, train_on, undisturbed(3)) == ["finished"] * 3
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed(3).folder.rglob("*.safetensors")}


def test_a_delayed_attack_is_plain_simclr_before_it(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    """A step that leaves out one route made DDP's next forward raise."""
    config = replace(recipe(shards, tmp_path / "run"), method=Clae.Settings(start_epoch=1.0))
    assert ranks.run(2, train_on, config) == ["finished"] * 2
    assert [line["step"] for line in logged(config) if "loss_adversarial" in line] == [5, 6, 7, 8]


def test_lines_are_about_attacked_steps(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    config = recipe(shards, tmp_path / "run", log_every=4, diagnose_every=100, knn_every=0)
    ranks.run(1, train_on, replace(config, method=Clae.Settings(every=2)))
    assert [line["step"] for line in logged(config) if line.get("loss_adversarial", 0) > 0] == [
        1,
        4,
        8,
    ]  # the first is diagnosed


def test_a_line_has_the_mean_of_the_steps_since_the_last(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    """It had the loss of one step alone. Every second step is attacked: its loss has more terms."""
    every = {}
    for log_every in (1, 4):
        config = recipe(shards, tmp_path / str(log_every), log_every=log_every, diagnose_every=100, knn_every=0, threads=1)
        ranks.run(1, train_on, replace(config, method=Clae.Settings(every=2)))
        every[log_every] = {line["step"]: line for line in logged(config) if "loss" in line}
    assert sorted(every[4]) == [1, 4, 8]  # the first is diagnosed
    for key, steps in (("loss", [5, 6, 7, 8]), ("loss_clean", [5, 6, 7, 8]), ("loss_adversarial", [5, 7])):
        mean = sum(every[1][step][key] for step in steps) / len(steps)
        assert every[4][8][key] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("norm", ["global", "local"])
def test_bfloat16_trains_close_to_float32(ranks: RankPool, shards: Manifest, tmp_path: Path, norm: str) -> None:
    first = {}
    for precision in ("float32", "bfloat16"):
        config = recipe(shards, tmp_path / precision, precision=precision, epochs=1, knn_every=0)
        config = replace(config, model=replace(config.model, norm=norm), optim=replace(config.optim, warmup_epochs=0))
        assert ranks.run(2, train_on, config) == ["finished"] * 2
        first[precision] = logged(config)[0]
    assert first["bfloat16"]["loss"] == pytest.approx(first["float32"]["loss"], rel=0.01)  # 8 bits of mantissa
    assert first["bfloat16"]["loss"] != first["float32"]["loss"]
    assert first["bfloat16"]["grad_norm"] == pytest.approx(first["float32"]["grad_norm"], rel=0.1)


def test_local_norms_train_and_save_one_set_of_statistics(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    config = replace(recipe(shards, tmp_path / "run"), model=Model(encoder="small_resnet", projector_dim=16, norm="local"))
    assert ranks.run(2, train_on, config) == ["finished"] * 2
    assert load_model(config.folder)[2] == {"step": STEPS, "images_seen": STEPS * 24}


# ---- failing together ----


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
            return replace(metrics, grad_norm=torch.tensor(torch.inf)) if count == 3 else metrics

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
    found = ranks.run(3, outcome, recipe(shards, tmp_path / "run"), "one rank's loader process dies")
    assert len(set(found)) == 1
    assert found[0][0] == "DataError"
    assert "rank 1 cannot load its batch: RuntimeError: DataLoader worker (pid 7) is killed" in found[0][1]


def test_a_loss_that_is_not_finite_ends_all_ranks(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    config = replace(recipe(shards, tmp_path / "run"), model=Model(encoder="small_resnet", norm="local"))
    found = ranks.run(3, outcome, config, "one rank's loss is not finite")
    assert len(set(found)) == 1
    assert found[0][0] == "RankError"
    assert "the loss is not finite" in found[0][1]
    assert found[0][1].endswith("(on rank 1 of 3)")  # though every rank's loss is, with its rows among the negatives


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_never_saved(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    """The loss was finite: clipping then makes every weight a NaN, in the very step that is saved."""
    config = recipe(shards, tmp_path / "run")
    found = ranks.run(2, outcome, config, "one gradient is not finite")
    assert len(set(found)) == 1
    assert found[0][0] == "RankError"
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
    ranks: RankPool, shards: Manifest, tmp_path: Path, undisturbed: Callable[[int], Config]
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
    assert_bitwise(final(config), final(undisturbed(3)))


# ---- when a run saves ----


def test_saving_by_the_clock(shards: Manifest, tmp_path: Path) -> None:
    """Before every step but the first, where there is nothing to save, and at the end."""
    config = replace(
        recipe(shards, tmp_path / "run", knn_every=0), checkpoint=Checkpointing(every_steps=0, every_minutes=1e-9, keep=100)
    )
    assert train_on(World.single("cpu"), config) == "finished"
    assert [int(path.name[-2:]) for path in RunFolder(config.folder).find_checkpoints()] == list(range(STEPS, 0, -1))
    final(config)
    blocked = [line["checkpoint_blocked_s"] for line in logged(config) if "checkpoint_blocked_s" in line]
    assert len(blocked) == STEPS
    assert min(blocked) > 0


def test_slow_storage_holds_up_the_next_save_and_is_said_once(
    shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write goes on until somebody waits for it: every save finds the one before unfinished."""
    waited_for, write, join = threading.Event(), Writer._write, Writer.join

    def slow(*arguments: Any) -> None:
        waited_for.wait(60)
        waited_for.clear()
        write(*arguments)

    def waiting(writer: Writer) -> None:
        waited_for.set()
        join(writer)

    monkeypatch.setattr(Writer, "_write", slow)
    monkeypatch.setattr(Writer, "join", waiting)
    config = replace(recipe(shards, tmp_path / "run", knn_every=0), checkpoint=Checkpointing(every_steps=2))
    said = io.StringIO()
    assert training.train(Recipe(config), World.single("cpu"), said).status == "finished"
    assert said.getvalue().count("waits for that of step 2 to be written: storage is slower") == 1
    assert said.getvalue().count("waits for") == 1
    assert [int(path.name[-2:]) for path in RunFolder(config.folder).find_checkpoints()] == [8, 6, 4]


def test_a_run_that_data_ends_keeps_the_checkpoint_it_was_writing(
    shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = training.load

    def ends(*arguments: Any) -> Any:
        yield from list(load(*arguments))[:3]
        raise DataError("no more")

    monkeypatch.setattr(training, "load", ends)
    config = recipe(shards, tmp_path / "run", knn_every=0)
    with pytest.raises(DataError, match="no more"):
        training.train(Recipe(config), World.single("cpu"), io.StringIO())
    assert [path.name for path in RunFolder(config.folder).find_checkpoints()] == ["step-00000003"]


def test_a_run_folder_of_another_configuration_is_refused(
    ranks: RankPool, shards: Manifest, undisturbed: Callable[[int], Config]
) -> None:
    config = undisturbed(3)
    other = replace(config, objective=replace(config.objective, temperature=0.1), train=replace(config.train, log_every=7))
    found = ranks.run(3, outcome, other)
    assert len(set(found)) == 1
    assert found[0][0] == "ConfigError"
    assert "belongs to another configuration: objective.temperature was 0.5 and is 0.1." in found[0][1]


def test_other_images_in_the_same_run_are_refused(
    ranks: RankPool, tmp_path: Path, undisturbed: Callable[[int], Config]
) -> None:
    others = write_synthetic_set(tmp_path / "shards", 96, 16)
    config = replace(undisturbed(3), data=replace(undisturbed(3).data, shards=str(others.folder)))
    assert "the images were" in ranks.run(3, outcome, config)[0][1]


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
    config = recipe(damaged, tmp_path / "run")
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


def test_a_run_that_waits_for_data_says_once_what_to_change(
    shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MOST_WAIT", -1)
    said = io.StringIO()
    assert training.train(Recipe(recipe(shards, tmp_path / "run")), World.single("cpu"), said).step == STEPS
    assert said.getvalue().count("of the time is spent waiting for data") == 1
    assert "data.workers is 0 a rank" in said.getvalue()


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
