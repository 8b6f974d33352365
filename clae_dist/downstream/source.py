"""The settings of a task that its source decides: a run, an exported encoder, or an encoder of timm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clae_dist.config import Config
from clae_dist.errors import ConfigError
from clae_dist.staging import shown_path

# Of a run: what its encoder is, how it sees images, and where they were.
_OF_RUN = (
    "model.encoder",
    "model.stem",
    "model.mean",
    "model.std",
    "data.image_size",
    "data.shards",
    "data.train_split",
    "data.test_split",
    "data.long_tail",
    "seed",
)


def of_run(config: Config, values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings from those of a run; `values` are all of them by key."""
    found = {key: values[key] for key in _OF_RUN if values[key] != ""}
    if config.model.norm == "local":  # as its owner has chosen between speed and exactness
        found["model.norm"] = "local"
    return {**found, "model.init": shown_path(path), "name": f"{path.name}-"}


def of_export(description: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings from the config.json of an exported encoder. Raises ConfigError."""
    try:
        own_stem = description["encoder"] == "small_resnet"  # which is made with it
        return {
            "model.encoder": str(description["encoder"]),
            "model.stem": "auto" if own_stem else "cifar" if description["stem"] else "imagenet",
            "model.mean": [float(value) for value in description["mean"]],
            "model.std": [float(value) for value in description["std"]],
            "data.image_size": int(description["input_size"][1]),
            "model.init": shown_path(path),
            "name": f"{path.parent.name if path.name == 'export' else path.name}-",  # RUN/export is its run's
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"SOURCE is {shown_path(path)!r}, whose config.json lacks {error}; export the encoder again."
        ) from None


def of_timm(name: str) -> dict[str, Any]:
    """Settings for the published weights of timm/NAME."""
    return {"model.encoder": name, "model.init": "pretrained", "name": f"{name.partition('/')[2]}-"}


def as_overrides(settings: dict[str, Any]) -> list[str]:
    """The settings as key=value texts."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
