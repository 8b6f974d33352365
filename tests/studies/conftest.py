from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clae_dist.data.manifest import Manifest

WriteStudy = Callable[..., Path]
RECIPE = """
data: {{shards: {shards}, image_size: 16, workers: 0}}
batch: {{global_size: 24}}
model: {{encoder: small_resnet, projector_dim: 16}}
optim: {{name: adamw, learning_rate: 1e-3, scaling: none, warmup_epochs: 0.5}}
train: {{epochs: 6, log_every: 1, diagnose_every: 100, knn_every: 0, threads: 1}}
checkpoint: {{every_steps: 1}}
evaluation: {{linear_iterations: 5}}
tracking: {{name: none}}
launch: {{workers: 1}}
"""
STUDY = """
name: tiny
recipe: small.yaml
seeds: [0, 1]
budget: {passes: 1000}
methods:
  simclr: {set: {method.name: simclr}}
  clae: {set: {method.name: clae}}
"""


@pytest.fixture
def write_study(tmp_path: Path, shards: Manifest) -> WriteStudy:
    """write_study(text): a study file with a small recipe beside it; an epoch is 4 steps of 24 images."""

    def write(text: str = STUDY, **recipe: str) -> Path:
        settings = RECIPE.format(shards=recipe.pop("shards", shards.folder))
        (tmp_path / "small.yaml").write_text(settings)
        path = tmp_path / "tiny.yaml"
        path.write_text(text + f"folder: {tmp_path / 'study'}\n")
        return path

    return write
