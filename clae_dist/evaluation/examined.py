"""The encoders that one `clae evaluate` judges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clae_dist.config import Config
from clae_dist.errors import ConfigError
from clae_dist.models import PretrainModel, build_model
from clae_dist.runs.checkpoint import load_model
from clae_dist.runs.initial import load_initial
from clae_dist.runs.trust import NOTHING, Permission, open_run


@dataclass(frozen=True)
class Examined:
    """Encoders in evaluation mode, by "before" and "after" (pretraining), and where the results go.

    Args:
        title: for the console.
        folder: gets evaluation.json, and the folder evaluation/ with what an interrupted evaluation continues from.
        config: data.*, evaluation.*, model.mean and model.std, seed and train.precision are used.
        encoders: the one "after" at least.
    """

    title: str
    folder: Path
    config: Config
    encoders: dict[str, PretrainModel]
    step: int = 0
    images_seen: int = 0


def examined_run(run_dir: Path, shards: str = "", permission: Permission = NOTHING) -> Examined:
    """The encoder of a run as it was initialised from the run's seed or its model.init, and that of the newest checkpoint.

    Args:
        shards: the location of the images, if they have moved, or of other images to evaluate on.

    Raises ConfigError without a checkpoint, and for settings of the run that `permission` does not cover (runs/trust.py).
    """
    config = open_run(run_dir, permission).to_read_images(shards)
    _, trained, info = load_model(run_dir)
    if not config.data.shards:
        raise ConfigError("data.shards is ''; name the folder of shards that the run was trained on.")
    untrained = build_model(config)
    load_initial(config.model, run_dir, untrained.encoder)
    title = f"{run_dir} after {info['images_seen']:,} images"
    return Examined(title, run_dir, config, {"before": untrained.eval(), "after": trained}, info["step"], info["images_seen"])
