"""The adversarial view. Knows a closure that gives a loss, not a model.

# x_BCHW  images of this rank; the loss may depend on every other rank's images too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Perturbation:
    """What an attack did. `loss_before` is the loss at the unperturbed images."""

    images: torch.Tensor
    loss_before: torch.Tensor


def perturb(
    x_BCHW: torch.Tensor,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    epsilon: float | torch.Tensor,
    valid: tuple[float, float] | None = (0.0, 1.0),
) -> Perturbation:
    """FGSM (Goodfellow et al. 2015; Ho & Vasconcelos 2020, equation 9): x + ε · sign ∂ loss / ∂ x.

    `epsilon` is a number or a tensor that broadcasts over x (one ε a channel); `valid` bounds the result, None does not.
    The gradient is taken with respect to the input alone: parameters get no gradient, and no reduction across ranks runs
    but those inside `loss_of`. It arrives multiplied by the number of ranks, which the sign does not see.
    """
    x_try = x_BCHW.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_of(x_try)
        (gradient,) = torch.autograd.grad(loss, x_try)
    adversarial = x_BCHW + epsilon * gradient.sign()
    if valid is not None:
        adversarial = adversarial.clamp(*valid)
    return Perturbation(adversarial.detach(), loss.detach())
