"""Whole runs on real gloo ranks: resuming, stopping, logging. All weights are compared bit for bit."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.config import Checkpointing, Config, Model
from clae_dist.data.manifest import Manifest
from clae_dist.errors import DataError
from clae_dist.methods.clae import Clae
from clae_dist.recipe import Recipe
from clae_dist.runs.checkpoint import Writer, load_checkpoint, load_model
from clae_dist.runs.folder import STOP_FILE, RunFolder
from clae_dist.training import journal
from clae_dist.training import train as training
from clae_dist.training.journal import PHASES
from clae_dist.world import World
from tests.ranks import RankPool
from tests.training.disturbed import BARE, STEPS, assert_bitwise, final, logged, recipe, train_on

MEASURED = ("goodput", "peak_memory_gib")  # besides times and shares of them


@pytest.mark.parametrize("world_size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_lost_run_goes_on_to_the_same_bits(
    ranks: RankPool, shards: Manifest, tmp_path: Path, finished_run: Callable[[int], Config], world_size: int
) -> None:
    """Three ranks: where DDP put a gradient in its buckets decides the last bit of a sum (parallel/ddp.py)."""
    config = recipe(shards, tmp_path / "run")
    assert ranks.run(world_size, train_on, config, 6) == ["lost"] * world_size
    assert [path.name for path in RunFolder(config.folder).find_checkpoints()] == ["step-00000003"]
    assert ranks.run(world_size, train_on, config) == ["finished"] * world_size
    assert_bitwise(final(config), final(finished_run(world_size)))
    timeless = [
        [
            {key: value for key, value in line.items() if not key.endswith(("_s", "_share")) and key not in MEASURED}
            for line in logged(c)
        ]
        for c in (config, finished_run(world_size))
    ]
    assert timeless[0] == timeless[1]  # what was logged after the checkpoint and lost is logged once


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_same_bits(
    ranks: RankPool, shards: Manifest, tmp_path: Path, finished_run: Callable[[int], Config], world_size: int
) -> None:
    config = recipe(shards, tmp_path / "run")
    assert ranks.run(world_size, train_on, config, 0, 2) == ["stopped"] * world_size
    assert [path.name for path in RunFolder(config.folder).find_checkpoints()] == ["step-00000002"]
    (config.folder / STOP_FILE).unlink()
    assert ranks.run(world_size, train_on, config) == ["finished"] * world_size
    assert_bitwise(final(config), final(finished_run(world_size)))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    ranks: RankPool, shards: Manifest, tmp_path: Path, finished_run: Callable[[int], Config]
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
    assert_bitwise(final(config), final(finished_run(3)))


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


def test_what_is_logged(finished_run: Callable[[int], Config]) -> None:
    lines = logged(finished_run(2))
    assert [line["images_seen"] for line in lines if "loss" in line] == [24 * (i + 1) for i in range(STEPS)]
    measured = [line for line in lines if "wrong_sign_share" in line]
    assert [line["step"] for line in measured] == [1, 4, 7]
    for line in measured:
        assert 0 < line["wrong_sign_share"] < 100
        assert line["attack_loss_after"] > line["attack_loss_before"]
        assert 0 < line["delta_linf"] <= 4 / 255 + 1e-6
        assert line["cos_negative_hardest"] >= line["cos_negative_mean"]
        assert line["alignment"] == pytest.approx(2 - 2 * line["cos_positive"], abs=1e-5)  # float32
    for line in lines:
        if "loss" in line:
            phases = [line[f"{name}_share"] for name in PHASES]
            assert min(phases[: PHASES.index("diagnosis")]) > 0
            assert (line["diagnosis_share"] > 0) == ("wrong_sign_share" in line)
            assert sum(phases) <= 100
            assert line["peak_memory_gib"] > 0.05
    assert [line["step"] for line in lines if "knn_accuracy" in line] == [0, 4, 8]
    assert all(
        line["knn_accuracy_low"] <= line["knn_accuracy"] <= line["knn_accuracy_high"]
        for line in lines
        if "knn_accuracy" in line
    )


@pytest.mark.slow
def test_diagnosing_changes_nothing(
    ranks: RankPool, shards: Manifest, tmp_path: Path, finished_run: Callable[[int], Config]
) -> None:
    config = recipe(shards, tmp_path / "run", diagnose_every=1, knn_every=0.5, log_every=2)
    ranks.run(3, train_on, config)
    assert_bitwise(final(config)["model"], final(finished_run(3))["model"])


def test_a_finished_run_says_so(ranks: RankPool, finished_run: Callable[[int], Config]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run(2).folder.rglob("*.safetensors")}
    assert before
    assert ranks.run(2, train_on, finished_run(2)) == ["finished"] * 2
    assert before == {path: path.stat().st_mtime_ns for path in finished_run(2).folder.rglob("*.safetensors")}


def test_a_delayed_attack_is_plain_simclr_before_it(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    """A step that leaves out one route made DDP's next forward raise."""
    config = replace(recipe(shards, tmp_path / "run", epochs=1, **BARE), method=Clae.Settings(start_epoch=0.5))
    assert ranks.run(2, train_on, config) == ["finished"] * 2
    assert [line["step"] for line in logged(config) if "loss_adversarial" in line] == [3, 4]


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
    all_steps, attacked = [5, 6, 7, 8], [5, 7]
    keys = dict.fromkeys(("loss_adversarial", "delta_linf_mean", "delta_l2_mean", "attack_loss_before_mean"), attacked)
    for key, steps in {**keys, **dict.fromkeys(("loss", "loss_clean", "grad_norm"), all_steps)}.items():
        mean = sum(every[1][step][key] for step in steps) / len(steps)
        assert every[4][8][key] == pytest.approx(mean, rel=1e-6)
    for key in ("loss", "loss_clean", "grad_norm"):  # the value of the step beside the mean
        assert every[4][8][f"{key}_step"] == every[1][8][f"{key}_step"] == pytest.approx(every[1][8][key], rel=1e-12)
        assert every[4][8][f"{key}_step"] != pytest.approx(every[4][8][key], rel=1e-6)
    assert "loss_adversarial_step" not in every[4][8]


@pytest.mark.parametrize(("world_size", "micro_size"), [(1, 0), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_what_steps_say_of_their_attack_is_what_a_diagnosis_measures(
    ranks: RankPool, shards: Manifest, tmp_path: Path, world_size: int, micro_size: int
) -> None:
    """The mean of one step is free of charge; the diagnosis of the same step costs forwards of its own."""
    config = recipe(shards, tmp_path / "run", diagnose_every=1, knn_every=0, epochs=1, threads=1)
    config = replace(config, batch=replace(config.batch, micro_size=micro_size))
    ranks.run(world_size, train_on, config)
    lines = [line for line in logged(config) if "loss" in line]
    assert len(lines) == 4
    for line in lines:
        for key in ("delta_linf", "delta_l2", "attack_loss_before"):
            assert line[f"{key}_mean"] == pytest.approx(line[key], rel=1e-6), key  # float32, sums in another order


@pytest.mark.parametrize("norm", ["global", pytest.param("local", marks=pytest.mark.slow)])
def test_bfloat16_trains_close_to_float32(ranks: RankPool, shards: Manifest, tmp_path: Path, norm: str) -> None:
    first = {}
    for precision in ("float32", "bfloat16"):
        config = recipe(shards, tmp_path / precision, precision=precision, **BARE)
        config = replace(config, model=replace(config.model, norm=norm), optim=replace(config.optim, warmup_epochs=0))
        config = replace(config, train=replace(config.train, epochs=0.25))  # a step
        assert ranks.run(2, train_on, config) == ["finished"] * 2
        first[precision] = logged(config)[0]
    assert first["bfloat16"]["loss"] == pytest.approx(first["float32"]["loss"], rel=0.01)  # 8 bits of mantissa
    assert first["bfloat16"]["loss"] != first["float32"]["loss"]
    assert first["bfloat16"]["grad_norm"] == pytest.approx(first["float32"]["grad_norm"], rel=0.1)


def test_local_norms_train_and_save_one_set_of_statistics(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    local = {"model": Model(encoder="small_resnet", projector_dim=16, norm="local")}
    config = recipe(shards, tmp_path / "run", epochs=0.75, sections=local, **BARE)
    assert ranks.run(2, train_on, config) == ["finished"] * 2
    assert load_model(config.folder)[2] == {"step": 3, "images_seen": 72}


# ---- when a run saves ----


def test_saving_by_the_clock(shards: Manifest, tmp_path: Path) -> None:
    """Before every step but the first, where there is nothing to save, and at the end."""
    config = replace(
        recipe(shards, tmp_path / "run", epochs=1, **BARE),
        checkpoint=Checkpointing(every_steps=0, every_minutes=1e-9, keep=100),
    )
    assert train_on(World.single("cpu"), config) == "finished"
    assert [int(path.name[-2:]) for path in RunFolder(config.folder).find_checkpoints()] == [4, 3, 2, 1]
    final(config, steps=4)
    blocked = [line["checkpoint_blocked_s"] for line in logged(config) if "checkpoint_blocked_s" in line]
    assert len(blocked) == 4
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
    config = replace(recipe(shards, tmp_path / "run", **BARE), checkpoint=Checkpointing(every_steps=2))
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
    config = recipe(shards, tmp_path / "run", **BARE)
    with pytest.raises(DataError, match="no more"):
        training.train(Recipe(config), World.single("cpu"), io.StringIO())
    assert [path.name for path in RunFolder(config.folder).find_checkpoints()] == ["step-00000003"]


def test_a_run_that_waits_for_data_says_once_what_to_change(
    shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MOST_WAIT", -1)
    said = io.StringIO()
    config = recipe(shards, tmp_path / "run", epochs=1, **BARE)
    assert training.train(Recipe(config), World.single("cpu"), said).step == 4
    assert said.getvalue().count("of the time is spent waiting for data") == 1
    assert "data.workers is 0 a rank" in said.getvalue()
