"""Whole runs under every backend, as users start them: by this process, torchrun and Ray; and from one backend to another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from clae_dist.data.manifest import Manifest
from clae_dist.methods.clae_fused import ClaeFused
from clae_dist.runs.checkpoint import load_checkpoint, load_model
from tests import processes
from tests.processes import CLAE, TORCHRUN
from tests.small_run import write_recipe

SETTINGS = ("train.epochs=2", "train.diagnose_every=4", "train.knn_every=1", "train.ema_decay=0.9")  # 8 steps
SETTINGS += ("batch.micro_size=4", "optim.clip_norm=1")
START = {"local": CLAE, "ray": CLAE, "torchrun": TORCHRUN}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, shards: Manifest) -> Path:
    return write_recipe(tmp_path_factory.mktemp("fused"), shards, method=ClaeFused.Settings())


def train(recipe: Path, run_dir: Path, launcher: str, *settings: str) -> str:
    command = [*START[launcher], "train", recipe, f"run_dir={run_dir}", *SETTINGS, *settings, "--launcher", launcher]
    done = processes.run(*command, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_finished(run_dir: Path) -> None:
    checkpoint = load_checkpoint(run_dir, pytest.fail)
    assert checkpoint is not None
    assert checkpoint.step == 8
    state = checkpoint.state()
    _, model, _ = load_model(run_dir)
    weight = model.get_parameter("projector.0.weight")
    assert torch.equal(weight, state["average"]["projector.0.weight"])  # what is evaluated
    assert not torch.equal(weight, state["model"]["projector.0.weight"])
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "knn_accuracy" in line] == [0, 4, 8]
    assert all(line["loss_adversarial"] > 0 for line in lines if "loss" in line)


EVERY = [("fsdp2",), ("fsdp2", "train.activation_checkpointing=true"), ("deepspeed", "parallel.zero_stage=1")]
EVERY += [("deepspeed", f"parallel.zero_stage={stage}") for stage in (0, 2, 3)]


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        pytest.param("torchrun", EVERY[0], marks=pytest.mark.slow),
        pytest.param("torchrun", EVERY[2], marks=pytest.mark.long),
        pytest.param("local", EVERY[1], marks=pytest.mark.slow),
        pytest.param("local", EVERY[3], marks=pytest.mark.long),
        pytest.param("local", EVERY[4], marks=pytest.mark.slow),
        pytest.param("ray", EVERY[0], marks=pytest.mark.long),
        pytest.param("ray", EVERY[5], marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_run_under_each_backend(recipe: Path, tmp_path: Path, launcher: str, settings: tuple[str, ...]) -> None:
    backend, *more = settings
    said = train(recipe, tmp_path / "run", launcher, f"parallel.backend={backend}", *more)
    assert "finished: 8 steps" in said
    assert f"; {backend}" in said
    assert_finished(tmp_path / "run")


@pytest.mark.slow
def test_a_run_goes_on_under_other_backends(recipe: Path, tmp_path: Path) -> None:
    """Its checkpoints hold whole tensors: here one that FSDP2 wrote, then one of ZeRO-3's, end under DDP."""
    run_dir = tmp_path / "run"
    train(recipe, run_dir, "local", "parallel.backend=fsdp2")
    newest, *_ = sorted((run_dir / "checkpoints").iterdir(), reverse=True)
    shutil.rmtree(newest)  # as if it had been lost after step 4
    train(recipe, run_dir, "local", "parallel.backend=deepspeed", "parallel.zero_stage=3")
    assert_finished(run_dir)
    shutil.rmtree(newest)
    train(recipe, run_dir, "local", "parallel.backend=ddp", "launch.workers=1")
    assert_finished(run_dir)
