"""The encoder that `clae evaluate` is given by name: a run's, an export's, or published weights."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from clae_dist.config import Config, Data, Model
from clae_dist.deploy.encoder import load_encoder
from clae_dist.deploy.initial import resolve
from clae_dist.deploy.layout import CONFIG
from clae_dist.errors import ConfigError
from clae_dist.evaluation.examined import Examined, examined_run
from clae_dist.home import expand_home
from clae_dist.keys import flatten
from clae_dist.models import PretrainModel
from clae_dist.models.encoders import FAMILIES, build_encoder, published_size
from clae_dist.recipe import Setting, build, parse_overrides
from clae_dist.runs.folder import CONFIG_FILE
from clae_dist.runs.trust import NOTHING, Permission

_MAY_CHANGE = ("evaluation.", "data.image_size", "data.train_split", "data.test_split", "data.workers")


def examined(
    name: str, shards: str = "", to: str = "", overrides: list[str] | None = None, permission: Permission = NOTHING
) -> Examined:
    """The encoders to evaluate, and the folder that gets the results.

    Args:
        name: the folder of a run or of an export, or published weights as timm/NAME or torchvision/NAME.
        shards: the images; by default those that a run was trained on.
        to: the folder for the results; by default that of the run or export.
        overrides: texts key=value of settings of evaluation and images.

    Raises ConfigError for a name that is none of these, and for what `examined_run`, `load_encoder` and `resolve` refuse.
    """
    folder = Path(name).expanduser()
    if os.path.lexists(folder / CONFIG_FILE):
        found = examined_run(folder, shards, permission)
    elif os.path.lexists(folder / CONFIG):
        found = _of_export(folder, shards)
    elif name.partition("/")[0] in FAMILIES and "/" in name:
        found = _of_name(name, shards, to, overrides or [])
    else:
        raise ConfigError(
            f"SUBJECT is {name!r}, which is neither the folder of a run or an export nor timm/NAME or torchvision/NAME; name "
            "one of these, such as runs/clae, runs/clae/export or timm/resnet18.a1_in1k."
        )
    config = _overridden(found.config, overrides or [])
    return replace(found, config=config, folder=Path(to).expanduser() if to else found.folder)


def _overridden(config: Config, overrides: list[str]) -> Config:
    settings = parse_overrides(overrides)
    for key in settings:
        if not key.startswith(_MAY_CHANGE):
            raise ConfigError(f"{key} has no meaning in an evaluation; it takes {', '.join(_MAY_CHANGE)}* and protocols' keys.")
    if not settings:
        return config
    return build({key: Setting(value, "evaluated run") for key, value in flatten(config).items()} | settings)


def _of_export(folder: Path, shards: str) -> Examined:
    encoder = load_encoder(folder)
    if not shards:
        raise ConfigError(f"SUBJECT is {str(folder)!r}, an export, which names no images; name a set with --shards.")
    model = PretrainModel(
        encoder.network,
        encoder.num_features,
        nn.Sequential(),
        encoder.num_features,
        tuple(encoder.mean.flatten().tolist()),
        tuple(encoder.std.flatten().tolist()),
    ).eval()
    source = encoder.source
    config = Config(data=Data(shards=shards, image_size=encoder.image_size), model=Model(encoder=source["encoder"]))
    title = f"{folder}, exported after {source['images_seen']:,} images"
    return Examined(title, folder, config, {"after": model}, source["step"], source["images_seen"])


def _of_name(name: str, shards: str, to: str, overrides: list[str]) -> Examined:
    for option, value, meaning in (("--shards", shards, "the images"), ("--to", to, "a folder for the results")):
        if not value:
            raise ConfigError(f"SUBJECT is {name!r}, published weights; name {meaning} with {option}.")
    family, _, architecture = name.partition("/")
    size = published_size(family, architecture) or 224
    mean, std = _statistics(family, architecture)
    model = Model(encoder=f"{family}/{architecture.partition('.')[0]}", init=name, stem="imagenet", mean=mean, std=std)
    config = _overridden(Config(data=Data(shards=shards, image_size=size), model=model), overrides)
    weights = resolve(config).weights
    with torch.random.fork_rng(devices=[]):
        encoder, width = build_encoder(model, config.data.image_size)
    encoder.load_state_dict(weights, strict=False)  # `resolve` has refused missing ones
    network = PretrainModel(encoder, width, nn.Sequential(), width, mean, std).eval()
    return Examined(name, Path(expand_home("--to", to, "--to")), config, {"after": network})


def _statistics(family: str, name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation with which the published weights were trained."""
    if family == "timm":
        import timm

        if settings := timm.models.get_pretrained_cfg(name):
            mean, std = (tuple(map(float, value)) for value in (settings.mean, settings.std))
            return mean, std  # type: ignore[return-value]
    return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
