"""A run of eight steps that can be lost or stopped at a step, and what it left."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.config import Config
from clae_dist.data.manifest import Manifest
from clae_dist.recipe import Recipe
from clae_dist.runs.checkpoint import load_checkpoint
from clae_dist.runs.folder import STOP_FILE
from clae_dist.training import train as training
from clae_dist.training.saving import Saving
from clae_dist.world import World
from tests.small_run import whole_run

STEPS = 8  # two epochs of 100 images in batches of 24


SETTINGS = {"epochs": 2, "every_steps": 3, "diagnose_every": 3, "knn_every": 1}
BARE = {"knn_every": 0, "diagnose_every": 100}  # steps, and nothing beside them that takes time


def recipe(shards: Manifest, run_dir: Path, **settings: Any) -> Config:
    return whole_run(shards, run_dir, **{**SETTINGS, **settings})


def train_on(world: World, config: Config, lose_at: int = 0, stop_at: int = 0) -> str:
    """Train; at step `lose_at` every rank fails as if the machine were lost (a half-written checkpoint is left behind).

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


def final(config: Config, steps: int = STEPS) -> dict[str, Any]:
    """The tensors of the last checkpoint, and what else it holds."""
    checkpoint = load_checkpoint(config.folder, lambda text: pytest.fail(text))
    assert checkpoint is not None
    assert checkpoint.step == steps
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
