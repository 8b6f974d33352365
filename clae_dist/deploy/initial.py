"""Initial weights of the encoder from elsewhere (`model.init`): pretrained ones, a file, an export or another run.

A run keeps a copy in its folder (runs/initial.py): its later starts and its evaluation do not need the source again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from clae_dist.config import Config
from clae_dist.deploy.encoder import load_encoder
from clae_dist.deploy.plain import exported_names
from clae_dist.deploy.resample import resample
from clae_dist.errors import ConfigError
from clae_dist.files import write_together
from clae_dist.models.encoders import FAMILIES, build_encoder, published_size
from clae_dist.runs.checkpoint.safetensors_file import weights_digest
from clae_dist.runs.copies import fetch
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.initial import read_weights
from clae_dist.staging import copy_folder, is_url

Weights = dict[str, torch.Tensor]
Say = Callable[[str], None]

_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")
_PREFIXES = ("module.", "encoder.", "backbone.", "model.", "network.")
_STEM = "conv1.weight"  # of a ResNet, which model.stem=cifar replaces
_SHOWN = 5


@dataclass(frozen=True)
class Match:
    """The names of tensors by what became of them."""

    loaded: list[str]
    missing: list[str]  # in the encoder, not in the source
    other_shape: dict[str, str]  # name -> both shapes
    unused: list[str]  # in the source, not in the encoder: usually its classifier
    resampled: dict[str, str]  # position embeddings of another image size: name -> both grids; they are among `loaded`

    def describe(self) -> str:
        """One line: how many tensors, and the names of those that were not loaded."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.resampled:
            parts.append(f"{len(self.resampled)} of them resampled to this image size ({_pairs(self.resampled)})")
        if self.missing:
            parts.append(f"{len(self.missing)} not in the source ({_some(self.missing)})")
        if self.other_shape:
            parts.append(f"{len(self.other_shape)} of another shape ({_pairs(self.other_shape)})")
        if self.unused:
            parts.append(f"{len(self.unused)} of the source not in the encoder ({_some(self.unused)})")
        return "; ".join(parts)


@dataclass(frozen=True)
class Initial:
    """Initial weights under the names of the plain encoder, and where they come from."""

    source: str
    digest: str  # sha256 over the loaded tensors
    match: Match
    weights: Weights

    @property
    def record(self) -> dict[str, str]:
        """Their entry in run.json."""
        return {"source": self.source, "digest": self.digest}

    def write(self, folder: RunFolder) -> None:
        """Keep them in the run folder."""
        folder.initial.mkdir(exist_ok=True)
        description = {**self.record, **asdict(self.match)}
        write_together(
            {
                folder.initial_weights: save(self.weights),
                folder.initial_file: (json.dumps(description, indent=2) + "\n").encode(),
            }
        )


def resolve(config: Config) -> Initial:
    """The weights that `model.init` names, matched with the encoder of `config`.

    Raises ConfigError for a source that cannot be read, and for one that does not fit: a tensor of the encoder that the source
    lacks or has in another shape, unless model.init_missing is "random". The convolution that model.stem=cifar replaces starts
    at random in any case, and position embeddings of another image size are resampled.
    """
    source = config.model.init
    encoder, _ = build_encoder(config.model, config.data.image_size)
    own = encoder.state_dict()
    found = _renamed(_read(source, config), own, config.model.encoder)
    found, resampled = _resampled(found, own)
    loaded = {name: found[name] for name in own if name in found and found[name].shape == own[name].shape}
    other_shape = {
        name: f"{tuple(found[name].shape)} there, {tuple(own[name].shape)} here"
        for name in own
        if name in found and found[name].shape != own[name].shape
    }
    missing = [name for name in own if name not in found and not name.endswith("num_batches_tracked")]
    match = Match(list(loaded), missing, other_shape, [name for name in found if name not in own], resampled)
    bad = [name for name, value in loaded.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise _unusable(source, f"{bad[0]} holds NaN or infinity")
    allowed = {_STEM} if config.model.stem != "imagenet" and _has_cifar_stem(encoder) else set()
    wrong = [name for name in (*missing, *other_shape) if name not in allowed]
    if not loaded or (wrong and config.model.init_missing == "error"):
        raise ConfigError(
            f"model.init is {source!r}, whose weights are not those of model.encoder {config.model.encoder}: "
            f"{match.describe()}. Use {_that_fits(config, match)}" + (", or model.init_missing=random." if loaded else ".")
        )
    return Initial(source, weights_digest(loaded), match, {name: value.contiguous() for name, value in loaded.items()})


# ---- sources ----


def _read(source: str, config: Config) -> Weights:
    family, _, name = source.partition("/")
    path = copy_folder(source, "model.init") if is_url(source) else Path(source).expanduser()
    fetch(path)
    if source == "pretrained":
        family, _, name = config.model.encoder.partition("/")
    if family in FAMILIES and name and not path.exists():
        return _pretrained(family, name, config)
    if source == "pretrained":
        raise ConfigError(
            f"model.init is 'pretrained', but {config.model.encoder} has no published weights; name a file or run."
        )
    if path.is_dir():
        return dict(load_encoder(path).network.state_dict())
    if not path.exists():
        raise ConfigError(
            f"model.init is {source!r}, which is neither a file nor a folder; name a .safetensors file, an exported encoder, "
            "a run, timm/NAME, torchvision/NAME, or pretrained."
        )
    if path.suffix != ".safetensors":
        kind = "a pickle, which can run any code when it is read" if path.suffix in _PICKLES else "no .safetensors file"
        raise ConfigError(
            f"model.init is {source!r}: {kind}. Convert its state dict, where you trust it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'weights.safetensors')."
        )
    return read_weights(path)


def _pretrained(family: str, name: str, config: Config) -> Weights:
    """Published weights, downloaded by timm or torchvision or from their cache, of the image size that they are made for."""
    architecture = name.partition(".")[0]
    try:
        if family == "timm":
            import timm

            network = timm.create_model(name, pretrained=True, num_classes=0)
        else:
            from torchvision import models

            network = models.get_model(architecture, weights=name.partition(".")[2] or "DEFAULT")
    except Exception as error:  # of urllib, requests, huggingface_hub, …: each has its own
        reason = " ".join(str(error).split())[:200]
        raise _unusable(config.model.init, f"{type(error).__name__}: {reason}", "; without a network, name a file") from None
    return dict(network.state_dict())


def _renamed(found: Weights, own: Weights, encoder: str) -> Weights:
    """`found` under the encoder's names: without a prefix such as `module.`, and small_resnet's from timm's."""
    while not own.keys() & found.keys():
        prefix = next((one for one in _PREFIXES if any(name.startswith(one) for name in found)), "")
        if not prefix:
            break
        found = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    back = {exported: name for name, exported in exported_names(encoder, own).items()}
    return {name if name in own else back.get(name, name): value for name, value in found.items()}


def _resampled(found: Weights, own: Weights) -> tuple[Weights, dict[str, str]]:
    """`found` with position embeddings of the shapes of `own`; and the grids of each that was resampled."""
    changed, grids = dict(found), {}
    for name in own.keys() & found.keys():
        if found[name].shape != own[name].shape and (result := resample(name, found[name], own[name].shape)):
            changed[name], grids[name] = result
    return changed, dict(sorted(grids.items()))


def _that_fits(config: Config, match: Match) -> str:
    """The way out where weights do not fit: another image size, if only shapes differ, or the right encoder."""
    source = config.model.encoder if config.model.init == "pretrained" else config.model.init
    family, _, name = source.partition("/")
    size = published_size(family, name.partition(".")[0]) if family in FAMILIES and name else 0
    if match.loaded and not match.missing and size not in (0, config.data.image_size):
        return f"data.image_size={size}, for which they were made"
    return "the encoder that they belong to"


def _has_cifar_stem(encoder: nn.Module) -> bool:
    return isinstance(getattr(encoder, "maxpool", None), nn.Identity)


def _pairs(texts: Mapping[str, str]) -> str:
    return _some([f"{name}: {text}" for name, text in texts.items()])


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _unusable(source: str, reason: str, way_out: str = "") -> ConfigError:
    return ConfigError(f"model.init is {source!r}, which cannot be used ({reason}){way_out}.")
