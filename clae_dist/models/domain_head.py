"""A head with two outputs: the classes, and the domain, whose gradient turns round on its way to the features.

# B rows, F feature width, C classes
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

MOST_PRODUCTS = 4096  # beyond it, random projections stand for features ⊗ probabilities (Long et al. 2018, section 3.2)
_PROJECTED = 1024


class _Reverse(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -weight. Reference: Ganin et al. 2016, equation 18."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return -weight.to(gradients[0].dtype) * gradients[0], None


class DomainHead(nn.Module):
    """Features (B, F) to (B, C + 1): logits of the classes, then that of the source domain.

    Args:
        conditional: the domain head sees features ⊗ softmax(logits), with constant probabilities.
    """

    reversal: torch.Tensor
    of_features: torch.Tensor
    of_classes: torch.Tensor

    def __init__(self, width: int, classes: int, hidden: int, *, conditional: bool) -> None:
        super().__init__()
        self.conditional = conditional
        self.classes = nn.Linear(width, classes)
        nn.init.zeros_(self.classes.weight)
        nn.init.zeros_(self.classes.bias)
        seen = width * classes if conditional else width
        self.projects = conditional and seen > MOST_PRODUCTS
        if self.projects:
            seen = _PROJECTED
            self.register_buffer("of_features", torch.randn(width, seen))
            self.register_buffer("of_classes", torch.randn(classes, seen))
        layers = [nn.Linear(seen, hidden), nn.LayerNorm(hidden), nn.ReLU()]
        layers += [nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, 1)]
        self.domain = nn.Sequential(*layers)
        self.register_buffer("reversal", torch.zeros(()), persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits = self.classes(features)
        seen = _Reverse.apply(features, self.reversal.clone())
        if self.conditional:
            shares = logits.detach().softmax(1)
            if self.projects:
                seen = (seen @ self.of_features) * (shares @ self.of_classes) / math.sqrt(_PROJECTED)
            else:
                seen = (seen[:, :, None] * shares[:, None]).flatten(1)
        return torch.cat([logits, self.domain(seen)], 1)
