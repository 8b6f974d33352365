"""Encoders by name: timm's, torchvision's, and a small residual network for CPUs and 32 pixels."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from clae_dist.config import Model
from clae_dist.errors import ConfigError

SMALL_RESNET_WIDTHS = (32, 64, 128, 256)


class _ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """(B, 3, H, W) -> (B, widths[-1]): a 3x3 stem, then a residual block per width; each but the first halves the side."""

    def __init__(self, widths: tuple[int, ...] = SMALL_RESNET_WIDTHS, stem_stride: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, stem_stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.blocks = nn.Sequential(
            *[_ResidualBlock(widths[max(i - 1, 0)], width, 1 if i == 0 else 2) for i, width in enumerate(widths)]
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(torch.relu(self.bn(self.stem(x)))).mean((2, 3))


def _unknown(name: str, family: str, known: list[str]) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(f'{family}/{c}' for c in close)}?" if close else f"{family} knows {len(known)} others."
    return ConfigError(f"model.encoder is '{family}/{name}', which {family} does not have; {hint}")


def has_resnet_stem(encoder: nn.Module) -> bool:
    """True if the encoder begins like the original ResNet: one convolution, then max-pool."""
    return isinstance(getattr(encoder, "conv1", None), nn.Conv2d) and hasattr(encoder, "maxpool")


def use_cifar_stem(encoder: nn.Module) -> None:
    """Replace a ResNet's 7x7 stride-2 convolution and max-pool by a 3x3 convolution. Reference: Chen et al. 2020, B.9."""
    conv = encoder.conv1
    assert isinstance(conv, nn.Conv2d)
    encoder.conv1 = nn.Conv2d(3, conv.out_channels, 3, 1, padding=1, bias=False)
    encoder.maxpool = nn.Identity()


def library_arguments(family: str, name: str, image_size: int) -> dict[str, Any]:
    """Arguments of timm's or torchvision's constructor of `name`, also for readers of an export."""
    if family == "torchvision":
        if name in ("googlenet", "inception_v3"):
            return {"aux_logits": False}  # their training-mode forward would return three outputs
        return {"image_size": image_size} if name.startswith("vit_") else {}
    import timm

    takes_size = "img_size" in inspect.signature(timm.models.model_entrypoint(name)).parameters
    return {"img_size": image_size} if takes_size or name.startswith(("vit_", "deit")) else _timm_size(name, image_size)


# Errors of encoders for an image size that they do not support: assertions of their own, or torch's errors.
_SIZE_ERRORS = (AssertionError, RuntimeError, ValueError, TypeError, IndexError)


@cache
def _timm_size(name: str, image_size: int) -> dict[str, Any]:
    """The argument that sets the image size of a timm encoder of fixed size (swin, beit, eva02, …).

    {} if it needs none or has none. Tried on torch's meta device, without memory for weights.
    """
    import timm

    if image_size == published_size("timm", name):
        return {}
    for arguments in ({}, {"img_size": image_size}):
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
                encoder = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
                encoder.eval()(torch.empty(1, 3, image_size, image_size))
        except _SIZE_ERRORS:
            continue
        return arguments
    return {}  # build_encoder's error names the size that the encoder supports


def published_size(family: str, name: str) -> int:
    """The image size of an encoder's published weights; 0 if unknown."""
    if family != "timm":
        return 299 if name == "inception_v3" else 224
    import timm

    settings = timm.models.get_pretrained_cfg(name)
    return int(settings.input_size[-1]) if settings else 0


def _feature_dim(encoder: nn.Module, name: str, image_size: int) -> int:
    """Width of the encoder's features. Raises ConfigError for an image size that it does not support."""
    was_training = encoder.training
    try:
        with torch.no_grad():
            return int(encoder.eval()(torch.zeros(1, 3, image_size, image_size)).flatten(1).shape[1])
    except _SIZE_ERRORS as error:
        raise _wrong_size(name, image_size, error) from None
    finally:
        encoder.train(was_training)


def _wrong_size(name: str, image_size: int, error: Exception) -> ConfigError:
    family, _, short = name.partition("/")
    size = published_size(family, short)
    way_out = f"use data.image_size={size}, or " if size and size != image_size else "use "
    reason = " ".join(str(error).split())[:120].rstrip(".")
    return ConfigError(
        f"data.image_size is {image_size}, which model.encoder {name} does not support ({reason}); {way_out}an encoder for any "
        "size, such as torchvision/resnet50 or timm/convnext_tiny."
    )


def _timm(name: str, image_size: int, **drop_rates: float) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise _unknown(name, "timm", timm.list_models())
    arguments = library_arguments("timm", name, image_size)
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **arguments, **drop_rates)
    except TypeError as error:
        refused = [key for key in drop_rates if f"'{key}'" in str(error)]
        if not refused:
            raise
        raise ConfigError(
            f"model.{refused[0]} is {drop_rates[refused[0]]:g}, which timm/{name} does not support; use 0, or an encoder "
            "that supports it, such as timm/resnet18 or timm/vit_tiny_patch16_224."
        ) from None


def _drop_rates(config: Model, family: str) -> dict[str, float]:
    """The rates of dropout and stochastic depth that `config` requests, as timm's constructors call them."""
    rates = {key: rate for key in ("drop_rate", "drop_path_rate") if (rate := getattr(config, key)) > 0}
    if rates and family != "timm":
        key, rate = next(iter(rates.items()))
        raise ConfigError(f"model.{key} is {rate:g}, but model.encoder is {config.encoder!r}; use 0, or an encoder of timm.")
    return rates


def _torchvision(name: str, image_size: int) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise _unknown(name, "torchvision", models.list_models(module=models))
    encoder = models.get_model(name, weights=None, **library_arguments("torchvision", name, image_size))
    for head in ("fc", "classifier", "heads", "head"):
        if hasattr(encoder, head):
            setattr(encoder, head, nn.Identity())
            return encoder
    raise ConfigError(f"model.encoder is 'torchvision/{name}', whose classifier could not be found; use timm/{name}.")


def _small_resnet(name: str, image_size: int) -> nn.Module:
    return SmallResNet()


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "small_resnet": _small_resnet,
    "timm": _timm,
    "torchvision": _torchvision,
}


def build_encoder(config: Model, image_size: int) -> tuple[nn.Module, int]:
    """Build the encoder that `config.encoder` names, without a classifier. Returns it and the width of its features.

    Raises ConfigError for an unknown name, with the nearest known ones, and for a size or drop rate that it does not support.
    """
    family, _, name = config.encoder.partition("/")
    if family not in FAMILIES or bool(name) != (family != "small_resnet"):
        raise ConfigError(
            f"model.encoder is {config.encoder!r}; "
            f"use small_resnet, timm/NAME or torchvision/NAME, such as timm/{name or family}."
        )
    try:
        encoder = FAMILIES[family](name, image_size, **_drop_rates(config, family))
    except ConfigError:
        raise
    except _SIZE_ERRORS as error:
        raise _wrong_size(config.encoder, image_size, error) from None
    if config.stem == "cifar" and not has_resnet_stem(encoder):
        raise ConfigError(
            f"model.stem is 'cifar', which is defined for ResNets with one 7x7 convolution, not for {config.encoder}; "
            "use model.stem=imagenet, or an encoder made for small images, such as small_resnet."
        )
    if config.stem == "cifar" or (config.stem == "auto" and image_size <= 64 and has_resnet_stem(encoder)):
        use_cifar_stem(encoder)
    return encoder, _feature_dim(encoder, config.encoder, image_size)
