"""The run that tests of whole runs take: some steps of a small network on noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clae_dist.config import Batch, Config, Data, Model, Optim, Tracking


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
