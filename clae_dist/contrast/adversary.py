"""The adversarial view. Knows a closure that gives a loss and its gradient, not a model.

# x_BCHW  images of this rank; the loss may depend on every other rank's images too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Norm = Literal["linf", "l2"]
LossAndGradient = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Perturbation:
    """The result of an attack. Loss and gradient (of this rank's images, unscaled) are those at its start."""

    images: torch.Tensor
    loss_before: torch.Tensor
    gradient: torch.Tensor


@dataclass(frozen=True)
class Ball:
    """The images within `epsilon` of another: in every pixel (linf; a tensor is one ε a channel), or in length (l2)."""

    epsilon: float | torch.Tensor
    norm: Norm = "linf"
    valid: tuple[float, float] | None = (0.0, 1.0)  # bounds of a pixel; None: unbounded
    valid_start: bool = True  # a random start has valid pixels, too

    def step(self, x: torch.Tensor, at: torch.Tensor, gradient: torch.Tensor, length: float | torch.Tensor) -> torch.Tensor:
        """From `at` along the gradient's sign (linf) or direction (l2), then back into the ball around x and the bounds."""
        if self.norm == "linf":
            delta = at - x + length * gradient.sign()
            delta = torch.clamp(delta, -self.epsilon, self.epsilon)  # type: ignore[arg-type]  # both numbers, or both tensors
        else:
            delta = at - x + length * _unit(gradient)
            delta = delta * (self.epsilon / _lengths(delta).clamp_min(1e-12)).clamp_max(1.0)
        return self.inside(x + delta)

    def random_point(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A point of the ball around x from uniform noise in [0, 1) of x's shape: uniform in it."""
        if self.norm == "linf":
            return self._start(x + self.epsilon * (2 * noise - 1))
        direction = _unit(torch.erfinv((2 * noise - 1).clamp(-1 + 1e-6, 1 - 1e-6)))  # normal numbers: no direction is preferred
        # Uniform, whatever the direction; in float64, whose sum of so many numbers still has digits behind the point.
        volume = (noise.double().flatten(1).sum(1) * 1009).frac().to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        return self._start(x + self.epsilon * volume ** (1 / x[0].numel()) * direction)

    def _start(self, images: torch.Tensor) -> torch.Tensor:
        return self.inside(images) if self.valid_start else images

    def inside(self, images: torch.Tensor) -> torch.Tensor:
        """Valid pixels."""
        return images if self.valid is None else images.clamp(*self.valid)


def _lengths(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))


def _unit(gradient: torch.Tensor) -> torch.Tensor:
    """Length one an image: the number of ranks that a gradient arrives multiplied with cancels. Zero stays zero."""
    gradient = gradient / gradient.abs().amax(tuple(range(1, gradient.dim())), keepdim=True).clamp_min(1e-30)
    return gradient / _lengths(gradient).clamp_min(1e-12)


def perturb(
    x_BCHW: torch.Tensor,
    gradient_of: Callable[[torch.Tensor], LossAndGradient],
    ball: Ball,
    *,
    steps: int = 1,
    step_length: float | torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> Perturbation:
    """Projected gradient ascent of a loss (Madry et al. 2018); one step of ε without noise is FGSM (Goodfellow et al. 2015;
    Ho & Vasconcelos 2020, equation 9): x + ε · sign ∂ loss / ∂ x.

    `gradient_of(images)` gives the loss and its gradient with respect to the images alone: parameters get no gradient. It
    arrives multiplied by the number of ranks, which neither sign nor direction sees. `noise`: uniform in [0, 1), for a random
    start; without it the attack starts at x. `step_length`: in the unit of ε, ε unless given. Every rank takes every step.
    """
    x = x_BCHW.detach()
    at = x if noise is None else ball.random_point(x, noise)
    first: LossAndGradient | None = None
    for _ in range(steps):
        loss, gradient = gradient_of(at)
        first = first or (loss.detach(), gradient)
        at = ball.step(x, at, gradient, ball.epsilon if step_length is None else step_length)
    assert first is not None
    return Perturbation(at.detach(), *first)
