"""The run that tests of whole runs take: some steps of a small network on noise."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.config import Batch, Checkpointing, Config, Data, Launch, Model, Optim, Tracking, Train
from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.recipe import Recipe, to_yaml
from clae_dist.runs.checkpoint import load_checkpoint
from clae_dist.training.train import train
from clae_dist.world import World
from tests.ranks import RankPool

EPOCHS, STEPS = 6, 24  # of whole_run
Undisturbed = Callable[..., Path]


def write_images(folder: Path) -> Manifest:
    """100 images of 16 pixels: an epoch of small_run is 4 steps."""
    return write_synthetic_set(folder, 100, 16, num_shards=3)


def small_run(shards: str | Path, run_dir: Path, **settings: Any) -> Config:
    """Settings of a run on these shards of 16-pixel images, tracked nowhere; `settings` are whole sections of Config."""
    sections = {
        "data": Data(shards=str(shards), image_size=16, workers=0),
        "batch": Batch(global_size=24),
        "model": Model(encoder="small_resnet", projector_dim=16),
        "optim": Optim(name="adamw", learning_rate=1e-3, scaling="none", warmup_epochs=0),
        "tracking": Tracking(name="none"),
    }
    return Config(run_dir=str(run_dir), **{**sections, **settings})


def whole_run(shards: Manifest, run_dir: Path, every_steps: int = 4, sections: Any = None, **train: Any) -> Config:
    """The run that tests disturb: a checkpoint every 4 steps; `train` and `sections` are settings besides."""
    defaults = {"epochs": EPOCHS, "log_every": 1, "diagnose_every": 100, "knn_every": 0, "threads": 1}
    return small_run(
        shards.folder,
        run_dir,
        **{
            "optim": Optim(name="adamw", learning_rate=1e-3, scaling="none", warmup_epochs=0.5),
            "train": Train(**{**defaults, **train}),
            "checkpoint": Checkpointing(every_steps=every_steps),
            **(sections or {}),
        },
    )


def write_recipe(folder: Path, shards: Manifest, **sections: Any) -> Path:
    """whole_run as a recipe, on two ranks."""
    path = folder / "small.yaml"
    path.write_text(to_yaml(whole_run(shards, folder / "run", sections={"launch": Launch(workers=2), **sections})))
    return path


def train_quietly(world: World, config: Config) -> str:
    """Train on this rank; how it ended."""
    return train(Recipe(config), world, io.StringIO()).status


def run_undisturbed(ranks: RankPool, shards: Manifest, folder: Path) -> Undisturbed:
    """undisturbed(world_size, **settings of whole_run): the folder of such a run that nothing disturbed, trained once."""
    trained: dict[str, Path] = {}

    def undisturbed(world_size: int, **settings: Any) -> Path:
        key = f"{world_size}-{sorted(settings.items())}"
        if key not in trained:
            config = whole_run(shards, folder / str(len(trained)), **settings)
            assert ranks.run(world_size, train_quietly, config) == ["finished"] * world_size
            trained[key] = config.folder
        return trained[key]

    return undisturbed


def weights(run_dir: Path, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """The model in the newest checkpoint, which is that of the last step."""
    checkpoint = load_checkpoint(run_dir, pytest.fail)
    assert checkpoint is not None
    assert checkpoint.step == steps
    return dict(checkpoint.state()["model"])


def assert_same_weights(run_dir: Path, other: Path, steps: int = STEPS) -> None:
    """Bit for bit."""
    actual, expected = weights(run_dir, steps), weights(other, steps)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
