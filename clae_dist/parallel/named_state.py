"""Optimiser state by parameter name, with whole tensors: what moves between backends and numbers of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

State = dict[str, dict[str, torch.Tensor]]  # parameter name -> {"exp_avg": …}


def named_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, whole: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
) -> State:
    """A copy of what every parameter has, on the CPU; `whole` makes a whole tensor of a rank's part (a collective)."""
    named: State = {}
    for name, parameter in model.named_parameters():
        entries: dict[str, Any] = optimizer.state.get(parameter, {})
        if entries:
            named[name] = {key: whole(torch.as_tensor(value)).to("cpu", copy=True) for key, value in sorted(entries.items())}
    return named


def load_named_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    state: State,
    part: Callable[[torch.Tensor, nn.Parameter], torch.Tensor] = lambda value, parameter: torch.empty_like(parameter).copy_(
        value
    ),
) -> None:
    """The opposite; `part` makes this rank's part of a whole tensor that has the shape of `parameter`."""
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        if name in state:
            optimizer.state[parameter] = {
                key: part(value.clone(), parameter) if value.shape == parameter.shape and value.dim() else value.clone()
                for key, value in state[name].items()
            }
