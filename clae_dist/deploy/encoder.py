"""A pretrained encoder with its preprocessing, from a run folder or an export.

# B images, S pixels a side, F width of the features
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from clae_dist.config import Model
from clae_dist.config.method import Route
from clae_dist.data.decode import pixels_of
from clae_dist.data.views import centre_view
from clae_dist.deploy.layout import CONFIG, FORMAT, WEIGHTS
from clae_dist.deploy.plain import exported_names, plain_encoder
from clae_dist.errors import ConfigError
from clae_dist.models.norms import has_route, single_route_state
from clae_dist.reading import Check, ReadError, expect, is_count, is_list_of, is_number, is_text, open_regular, read_object
from clae_dist.runs.checkpoint import load_model
from clae_dist.runs.folder import CONFIG_FILE
from clae_dist.runs.trust import Permission, check_folder
from clae_dist.staging import shown_path

if TYPE_CHECKING:
    from PIL import Image

_MAX_SIDE = 4096  # of the images of an export


class Encoder(nn.Module):
    """A pretrained encoder: `encoder(images)` are the features that evaluation uses, `encoder.transform` makes the images.

    `network` is the plain timm or torchvision model, which takes pixels after the normalisation; `image_size` is the side S of
    an image, `num_features` the width F of its features, `source` the origin of the weights (encoder, step, images_seen, …).
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        num_features: int,
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        source: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.network, self.num_features, self.image_size, self.source = network, num_features, image_size, dict(source)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.eval()

    def forward(self, images_B3SS: torch.Tensor) -> torch.Tensor:
        """Features (B, F) of RGB images (B, 3, S, S) with pixels in [0, 1], such as a stack of `transform`'s."""
        features: torch.Tensor = self.network((images_B3SS - self.mean) / self.std).flatten(1)
        return features

    def weights_digest(self) -> str:
        """The sha256 of the network's parameters and statistics, in hex: equal for a run's encoder and its export."""
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            if value.is_floating_point():
                digest.update(f"{name} {tuple(value.shape)}".encode())
                digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def transform(self, image: Image.Image) -> torch.Tensor:
        """The image as evaluation sees it, resized and cut to its centre: RGB float32 (3, S, S) in [0, 1].

        EXIF orientation is applied. Raises DecodeError, a ValueError, for an image that cannot be decoded.
        """
        return centre_view(pixels_of(image), self.image_size).float() / 255


def load_encoder(run_or_export: str | os.PathLike[str], *, route: Route | None = None, trust: bool = False) -> Encoder:
    """The encoder of a run's newest committed checkpoint, or of a folder that `clae export` wrote; on the CPU, in float32.

    Nothing in the folder is executed or unpickled. `route` selects the norm layers of a run that has several sets of them, by
    default those of its evaluation (evaluation.route); an export holds these alone. `trust` also opens a run folder of another
    user with links that lead out of it.
    Raises ConfigError for a folder that is neither a run with a checkpoint nor an export, and for damaged or NaN weights.
    """
    folder = Path(run_or_export).expanduser()
    if route is not None and route not in get_args(Route):
        raise ConfigError(f"route is {route!r}; use one of {', '.join(get_args(Route))}.")
    if os.path.lexists(folder / CONFIG_FILE):
        return _of_run(folder, route, Permission(trust))
    if os.path.lexists(folder / CONFIG):
        return _of_export(folder, route)
    raise ConfigError(
        f"RUN_OR_EXPORT is {shown_path(folder)!r}, which holds neither a run's {CONFIG_FILE} nor an export's {CONFIG}; name "
        "the folder of a run, such as runs/clae, or one that `clae export` wrote, such as runs/clae/export."
    )


def _of_run(run_dir: Path, route: Route | None, permission: Permission) -> Encoder:
    check_folder(run_dir, permission)
    config, model, info = load_model(run_dir)
    route = route or config.evaluated_route
    if not has_route(model.encoder, route):
        raise ConfigError(f"route is {route!r}, but the encoder of {str(run_dir)!r} has no such norm layers; use clean.")
    weights = {key: value.float() for key, value in single_route_state(model.encoder.state_dict(), route).items()}
    network, num_features = plain_encoder(config.model, config.data.image_size, weights)
    source = {"encoder": config.model.encoder, "route": route, "step": info["step"], "images_seen": info["images_seen"]}
    return Encoder(network, num_features, config.data.image_size, config.model.mean, config.model.std, source)


def _is_rgb(value: Any) -> bool:
    return is_list_of(is_number)(value) and len(value) == 3


def _is_size(value: Any) -> bool:
    return is_list_of(is_count)(value) and len(value) == 3 and value[0] == 3 and 8 <= value[1] == value[2] <= _MAX_SIDE


_FIELDS: dict[str, Check] = {
    "format_version": lambda value: value == FORMAT,
    "encoder": is_text,
    "route": lambda value: value in get_args(Route),
    "input_size": _is_size,
    "mean": _is_rgb,
    "std": _is_rgb,
    "stem": lambda value: value is None or isinstance(value, dict),
    **dict.fromkeys(("step", "images_seen"), is_count),
}


def _of_export(folder: Path, route: Route | None) -> Encoder:
    try:
        description = read_object(folder / CONFIG)
        expect(description, _FIELDS)
    except ReadError as error:
        raise _damaged(folder / CONFIG, str(error)) from None
    if route not in (None, description["route"]):
        held = description["route"]
        raise ConfigError(f"route is {route!r}, but {str(folder)!r} is an export, which holds the {held} one; name the run.")
    try:
        with open_regular(folder / WEIGHTS) as file:
            stored = load(file.read())
    except (ReadError, OSError, SafetensorError) as error:
        raise _damaged(folder / WEIGHTS, str(error)) from None
    bad = [name for name, value in stored.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise _damaged(folder / WEIGHTS, f"{bad[0]} holds NaN or infinity")
    return _built(folder, description, stored)


def _built(folder: Path, description: dict[str, Any], stored: dict[str, torch.Tensor]) -> Encoder:
    """The encoder by this package's own table of encoders: a foreign config.json names no code and no arguments."""
    name, size = description["encoder"], description["input_size"][1]
    mean, std = (tuple(map(float, description[key])) for key in ("mean", "std"))
    cifar = description["stem"] is not None and name != "small_resnet"
    settings = Model(encoder=name, stem="cifar" if cifar else "imagenet", mean=mean, std=std)  # type: ignore[arg-type]
    back = {exported: plain for plain, exported in exported_names(name, _names(settings, size)).items()}
    try:
        network, num_features = plain_encoder(settings, size, {back.get(key, key): value for key, value in stored.items()})
    except RuntimeError as error:
        raise _damaged(folder / WEIGHTS, " ".join(str(error).split())[:200]) from None
    source = {key: description[key] for key in ("encoder", "route", "step", "images_seen")}
    return Encoder(network, num_features, size, mean, std, source)


def _names(settings: Model, image_size: int) -> list[str]:
    from clae_dist.models.encoders import build_encoder

    with torch.device("meta"):
        return list(build_encoder(settings, image_size)[0].state_dict())


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path} cannot be used ({reason}); export the encoder again with `clae export RUN`.")
