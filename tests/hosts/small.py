"""The small run that the tests on several hosts start: its recipe, its images, what it must come to."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.runs.checkpoint import load_checkpoint
from clae_dist.runs.folder import RunFolder

CHECKPOINT_EVERY = "checkpoint.every_steps"  # the key of steps between checkpoints
STEPS = 24
# Time enough to lose a host and get it back, and float64: what two ranks and three add up in another order stays small.
LONG, LONG_STEPS = ("train.epochs=30", "train.precision=float64"), 120
RECIPE = """\
name: small
data: {image_size: 8, workers: 0}
batch: {global_size: 24}
model: {encoder: small_resnet, projector_dim: 16}
optim: {name: adamw, learning_rate: 1e-3, scaling: none, warmup_epochs: 0}
train: {epochs: 6, threads: 1, log_every: 1, diagnose_every: 100, knn_every: 0}
tracking: {name: none}
"""


def write_images(folder: Path) -> Manifest:
    """100 images: an epoch is 4 steps."""
    return write_synthetic_set(folder, 100, 16, num_shards=3)


def write_recipe(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(RECIPE)
    return path


def settings(shards: Manifest, run_dir: Path, *more: str) -> list[str]:
    """Overrides of the recipe: a checkpoint every 4 steps unless `more` says otherwise."""
    every = [] if any(word.startswith(f"{CHECKPOINT_EVERY}=") for word in more) else [f"{CHECKPOINT_EVERY}=4"]
    return [f"data.shards={shards.folder}", f"run_dir={run_dir}", *every, *more]


def weights(run_dir: Path, steps: int = STEPS) -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(run_dir, pytest.fail)
    assert checkpoint is not None
    assert checkpoint.step == steps
    return dict(checkpoint.state()["model"])


def saved_steps(run_dir: Path) -> list[int]:
    """The steps whose checkpoints there are, newest first."""
    return [int(path.name.removeprefix("step-")) for path in RunFolder(run_dir).find_checkpoints()]


def assert_bitwise(run_dir: Path, other: Path, steps: int = STEPS) -> None:
    found, wanted = weights(run_dir, steps), weights(other, steps)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def assert_steps_once(run_dir: Path, steps: int = STEPS) -> None:
    """The history that survived has every step exactly once, each with the images that are its own (log_every is 1)."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    seen = {line["images_seen"]: line["step"] for line in lines if "loss" in line}  # the last line of an images_seen counts
    assert seen == {24 * step: step for step in range(1, steps + 1)}


def wait_for(run_dir: Path, words: str, processes: Iterable[subprocess.Popen[str]], timeout_s: float = 600.0) -> str:
    """The run's console once `words` are in it; an AssertionError with all that was said when a process ends before."""
    deadline = time.monotonic() + timeout_s
    console = run_dir / "console.log"
    while words not in (said := console.read_text() if console.exists() else ""):
        ended = [process for process in processes if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            rest = [process.communicate()[0] for process in ended]
            raise AssertionError(f"{words!r} was not said before the end:\n{said}\n{rest}")
        time.sleep(0.05)
    return said


def finish(process: subprocess.Popen[str], timeout_s: float = 600.0) -> tuple[int, str]:
    """Exit code, and what was said from here on."""
    try:
        said, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        raise AssertionError(f"{process.args} did not end in {timeout_s:g} s:\n{said}") from None
    return process.returncode, said
