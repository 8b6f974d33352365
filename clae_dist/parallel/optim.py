"""Optimisers and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clae_dist.config import Optim
from clae_dist.models.blocks import depths


def make_optimizer(settings: Optim, learning_rate: float, model: nn.Module) -> torch.optim.Optimizer:
    """Make AdamW, SGD or LARS (You et al. 2017) over the parameters of `model`.

    With optim.decay "weights", biases and norm layers (parameters of one dimension), and a transformer's tokens and position
    embeddings, are neither decayed nor, under LARS, adapted, as in SimCLR. Every group has `lr_scale`, its share of the
    learning rate (optim.layer_decay).
    """
    tokens, shares = _tokens(model), _rate_shares(model, settings.layer_decay)
    groups: list[dict[str, Any]] = []
    for decayed in (True, False):
        for share in sorted(set(shares.values())):
            chosen = [
                p
                for n, p in model.named_parameters()
                if p.requires_grad
                and shares[p] == share
                and decayed == (settings.decay == "all" or not (p.dim() <= 1 or n in tokens))
            ]
            if chosen:
                decay = settings.weight_decay if decayed else 0.0
                groups.append({"params": chosen, "weight_decay": decay, "lr_scale": share, "decayed": decayed})
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=settings.momentum)
    from timm.optim import Lars

    for group in groups:  # a group without weight decay would otherwise not be adapted
        group["always_adapt"] = group["decayed"]
    return Lars(groups, lr=learning_rate, momentum=settings.momentum)


def _rate_shares(model: nn.Module, layer_decay: float) -> dict[nn.Parameter, float]:
    """The share of the learning rate of every parameter: layer_decay to the power of the blocks between it and the head.

    Reference: Clark et al. 2020 (ELECTRA), appendix B.
    """
    shares = dict.fromkeys(model.parameters(), 1.0)
    if layer_decay < 1:
        of_encoder = depths(model.encoder)  # type: ignore[arg-type]
        top = max(of_encoder.values()) + 1
        shares |= {parameter: layer_decay ** (top - depth) for parameter, depth in of_encoder.items()}
    return shares


def _tokens(model: nn.Module) -> set[str]:
    """Names of class tokens and position embeddings: those that timm's networks name, and torchvision's."""
    found = {name for name, _ in model.named_parameters() if name.split(".")[-1] in ("class_token", "pos_embedding")}
    for prefix, module in model.named_modules():
        if hasattr(module, "no_weight_decay"):
            found |= {f"{prefix}.{name}".removeprefix(".") for name in module.no_weight_decay()}
    return found


def clip_and_step(optimizer: torch.optim.Optimizer, model: nn.Module, norm: torch.Tensor, clip_norm: float) -> None:
    """Clip gradients whose norm is `norm` to `clip_norm` (0: not at all), and step."""
    if clip_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, norm)
    optimizer.step()


def learning_rate_at(
    step: int, total_steps: int, warmup_steps: int, peak: float, schedule: str, factors: Mapping[int, float] | None = None
) -> float:
    """Linear warm-up to `peak`, then by `schedule`: a half cosine to zero at `total_steps` (Loshchilov & Hutter 2017),
    constant, or times the factor that `factors` has for the last number of steps reached (1 before the first).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "steps":
        begun = [first for first in factors or {} if first <= step]
        return peak * (factors[max(begun)] if factors and begun else 1.0)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
