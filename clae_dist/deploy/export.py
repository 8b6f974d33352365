"""`clae export`: the encoder's weights and a config.json that timm or torchvision load without this package; ONNX."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from clae_dist import __version__
from clae_dist.config import Config
from clae_dist.deploy.card import card
from clae_dist.deploy.encoder import Encoder
from clae_dist.deploy.head import fit, write_head
from clae_dist.deploy.layout import CONFIG, FILES, FORMAT, HEAD, INT8_REPORT, README, TIMM_WEIGHTS, WEIGHTS, Contents
from clae_dist.deploy.onnx_export import add_graphs
from clae_dist.deploy.onnx_graph import require_onnx
from clae_dist.deploy.plain import exported_names, plain_encoder
from clae_dist.deploy.readme import readme
from clae_dist.deploy.run_images import RunImages, images_if_there, open_images
from clae_dist.deploy.timm_layout import difference, timm_settings, unsupported
from clae_dist.errors import ConfigError
from clae_dist.files import check_writable
from clae_dist.keys import flatten, shapes_result
from clae_dist.models.encoders import SMALL_RESNET_WIDTHS, SmallResNet, library_arguments
from clae_dist.models.norms import single_route_state
from clae_dist.runs.checkpoint import load_model
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.trust import NOTHING, Permission, check_folder
from clae_dist.storage import writing

Say = Callable[[str], None]


def export_encoder(
    run_dir: Path,
    destination: Path | None = None,
    permission: Permission = NOTHING,
    contents: Contents = Contents(),  # noqa: B008 - frozen
    shards: str = "",
    say: Say = lambda _: None,
) -> Path:
    """Write the encoder of the newest checkpoint into the folder `destination` (default: RUN/export), and return the folder.

    encoder.safetensors holds the evaluated route (evaluation.route) under the names that timm or torchvision give its weights,
    config.json what builds the model and its input, README.md the lines that load it. Where timm has the same model, the folder
    also has timm's own layout; elsewhere `timm_problem` in config.json is the reason. `contents` may have ONNX graphs and a
    linear classifier, for which the run's images are used, or those at `shards`. The folder appears complete or not at all;
    an older export is replaced.
    Raises ConfigError without a checkpoint, for a destination that holds something else, for a folder that cannot be
    read or written safely (runs/trust.py) and for an encoder that ONNX cannot express; DataError for unusable images;
    StorageError when the destination cannot be written.
    """
    check_folder(run_dir, permission)
    check_writable((destination or RunFolder(run_dir).export).absolute().parent)
    images = _images(run_dir, permission, contents, shards)
    config, model, info = load_model(run_dir)
    destination = destination or RunFolder(run_dir).export
    if destination.exists() and not _replaceable(destination):
        raise ConfigError(f"the destination is {str(destination)!r}, which holds other files; name a new folder.")
    weights = {
        key: value.float() for key, value in single_route_state(model.encoder.state_dict(), config.evaluated_route).items()
    }
    network, _ = plain_encoder(config.model, config.data.image_size, weights)
    description = _describe(config, info, _origin(run_dir), network, model.feature_dim)
    encoder = Encoder(network, model.feature_dim, config.data.image_size, config.model.mean, config.model.std, {})
    description["weights"] = encoder.weights_digest()
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        with writing(destination):
            _write(partial, description, encoder, contents, images, say)
            int8 = partial / INT8_REPORT
            report = json.loads(int8.read_text()) if int8.exists() else None
            (partial / README).write_text(readme(description, report, card(config, run_dir, description)))
            _replace_folder(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return destination


def _images(run_dir: Path, permission: Permission, contents: Contents, shards: str) -> RunImages | None:
    """The images that these contents need; None if they need none, or could do with noise."""
    if "onnx" in contents.formats:
        require_onnx()
    if contents.head or "onnx-int8" in contents.formats:
        return open_images(run_dir, shards, permission)
    return images_if_there(run_dir, shards, permission) if "onnx" in contents.formats else None


def _write(
    folder: Path, description: dict[str, Any], encoder: Encoder, contents: Contents, images: RunImages | None, say: Say
) -> None:
    """Write the files of an export, except README.md, with timm's layout if timm loads the same encoder from it."""
    facts = {key: _text(value) for key, value in description.items()}
    network = encoder.network
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(save(_exported_state(description["encoder"], network), {**facts, "format": "pt"}))
    problem = unsupported(description) if "timm" in contents.formats else "timm is not among --format"
    if not problem:
        (folder / CONFIG).write_text(json.dumps(description | timm_settings(description)))
        _link(folder / WEIGHTS, folder / TIMM_WEIGHTS)
        problem = difference(folder, network, description["input_size"][1])
        if problem:
            (folder / TIMM_WEIGHTS).unlink()
    description |= {"timm_problem": problem} | ({} if problem else timm_settings(description))
    description |= add_graphs(folder, encoder, facts, contents, images, say)
    if contents.head:
        assert images is not None
        head = fit(encoder, images, say)
        write_head(folder / HEAD, head, description["weights"])
        description["classes"] = head.classes
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def _link(path: Path, other: Path) -> None:
    """Make `other` the same file, or a copy on a file system without hard links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= FILES


def _replace_folder(partial: Path, destination: Path) -> None:
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    old = destination.with_name(partial.name + ".old")
    if destination.exists():
        destination.replace(old)
    try:
        partial.replace(destination)
    except OSError:
        if old.exists():
            old.replace(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _exported_state(encoder: str, network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the plain encoder under the names that timm or torchvision give them."""
    state = network.state_dict()
    return {exported: state[name].detach().clone().contiguous() for name, exported in exported_names(encoder, state).items()}


def _origin(run_dir: Path) -> dict[str, Any]:
    """The images of the run, the weights it began with ({}: random ones) and the run that it continues ({}: none)."""
    folder = RunFolder(run_dir)
    identity = folder.read_identity() if folder.identity_file.exists() else None
    return {
        "manifest_digest": identity.manifest_digest if identity else "",
        "initial_weights": identity.initial if identity else {},
        "pseudo_labels": identity.pseudo_labels if identity else {},
        "parent": identity.parent if identity else {},
    }


def _describe(
    config: Config, info: Mapping[str, Any], origin: Mapping[str, Any], plain: nn.Module, feature_dim: int
) -> dict[str, Any]:
    """The content of config.json for the encoder `plain`."""
    size = config.data.image_size
    family, _, name = config.model.encoder.partition("/")
    library, architecture, arguments = (
        ("timm", "resnet18", _small_resnet_arguments())
        if family == "small_resnet"
        else (family, name, library_arguments(family, name, size))
    )
    return {
        "format_version": FORMAT,
        "library": library,
        "architecture": architecture,
        "arguments": arguments,
        "stem": _stem(config, plain),
        "head": "" if library == "timm" else _head(plain),
        "num_features": feature_dim,
        "input_size": [3, size, size],
        "mean": list(config.model.mean),
        "std": list(config.model.std),
        "encoder": config.model.encoder,
        "method": config.method.title or config.method.name,
        "route": config.evaluated_route,
        "images_seen": info["images_seen"],
        "step": info["step"],
        **origin,
        "config_digest": config_digest(config),
        "package_version": __version__,
    }


def config_digest(config: Config) -> str:
    """sha256 over canonical JSON of every setting that shapes a run's result."""
    settings = {key: value for key, value in flatten(config).items() if shapes_result(key, config)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _small_resnet_arguments() -> dict[str, Any]:
    """SmallResNet as a timm ResNet of one basic block a stage.

    timm's ResNet has four stages, so those that are left over hold no blocks. "deep" sets the stem's width (twice
    stem_width); its convolution is replaced by config.json's `stem`.
    """
    widths = SMALL_RESNET_WIDTHS
    empty = 4 - len(widths)
    return {
        "layers": [1] * len(widths) + [0] * empty,
        "channels": [*widths, *widths[-1:] * empty],
        "stem_type": "deep",
        "stem_width": widths[0] // 2,
    }


def _stem(config: Config, plain: nn.Module) -> dict[str, int] | None:
    """The 3x3 convolution that replaces conv1, without a max-pool; None for an encoder as its library makes it."""
    if isinstance(plain, SmallResNet):
        conv: nn.Module = plain.stem
    elif config.model.stem != "imagenet" and isinstance(getattr(plain, "maxpool", None), nn.Identity):
        conv = plain.get_submodule("conv1")
    else:
        return None
    assert isinstance(conv, nn.Conv2d)
    assert conv.kernel_size == (3, 3)
    return {"out_channels": conv.out_channels, "stride": conv.stride[0]}


def _head(plain: nn.Module) -> str:
    """The attribute of a torchvision model that was replaced by the identity."""
    return next(name for name in ("fc", "classifier", "heads", "head") if isinstance(getattr(plain, name, None), nn.Identity))
