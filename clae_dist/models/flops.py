"""Floating-point operations of products and convolutions, where a multiplication with its addition counts two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def flops_of(action: Callable[[], Any]) -> float:
    """Operations of the products and convolutions that `action` runs. Compiled blocks are not seen."""
    with _CountFlops() as counter:
        action()
    return counter.total


def forward_flops(encoder: nn.Module, image_size: int) -> float:
    """Operations of an encoder's forward of one image, counted on the meta device."""
    copied = copy.deepcopy(encoder).to("meta").eval()
    parameter = next(copied.parameters())
    image = torch.zeros(1, 3, image_size, image_size, device="meta", dtype=parameter.dtype)
    with torch.no_grad():
        return flops_of(lambda: copied(image))


class _CountFlops(TorchDispatchMode):
    """torch's FlopCounterMode without its hooks by module, with which autograd.grad fails."""

    total = 0.0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        formula = flop_registry.get(operation._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result
