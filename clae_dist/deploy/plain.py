"""The encoder of a run as timm or torchvision build it: one set of norm layers, float32, plain names of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from clae_dist.config import Model
from clae_dist.models.encoders import build_encoder


def plain_encoder(settings: Model, image_size: int, weights: Mapping[str, torch.Tensor]) -> tuple[nn.Module, int]:
    """The encoder with these weights in evaluation mode, and the width of its features.

    Raises ConfigError for settings that name no encoder, RuntimeError for weights that are not the encoder's.
    """
    with torch.random.fork_rng(devices=[]):  # the initial weights are replaced
        encoder, num_features = build_encoder(settings, image_size)
    encoder.load_state_dict(dict(weights), strict=True)
    return encoder.eval(), num_features


def exported_names(encoder: str, names: Iterable[str]) -> dict[str, str]:
    """The names of an encoder's weights in an export, by their names in the encoder `model.encoder` names.

    They differ for small_resnet alone, whose weights are exported as those of timm's ResNet.
    """
    return {name: _timm_name(name) if encoder == "small_resnet" else name for name in names}


def _timm_name(key: str) -> str:
    parts = key.split(".")
    if parts[0] == "blocks":
        parts[:2] = [f"layer{int(parts[1]) + 1}", "0"]
        return ".".join("downsample" if part == "shortcut" else part for part in parts)
    return ".".join([{"stem": "conv1", "bn": "bn1"}[parts[0]], *parts[1:]])
