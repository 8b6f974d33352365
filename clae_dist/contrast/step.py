"""The training step: whoever opens this file reads the paper's algorithm (Ho & Vasconcelos 2020, algorithm 1).

# B rows on this rank, N rows on all ranks, D embedding width. x, y two views; a, b, c embeddings of x, y, x_adv.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from clae_dist.config import Attack
from clae_dist.contrast.adversary import Perturbation, perturb
from clae_dist.contrast.gather import contrast_on_global_batch
from clae_dist.contrast.objectives import OBJECTIVES
from clae_dist.world import World

Route = Literal["clean", "adversarial"]  # the norm layers that a forward takes (models/norms.py)


class TrainingBackend(Protocol):
    """What a parallel backend (clae_dist/parallel) does for the step."""

    def embed(self, images: torch.Tensor, route: Route) -> torch.Tensor: ...
    def backward(self, loss: torch.Tensor) -> None: ...
    def update(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Attacking:
    """What an attack works with."""

    world: World
    attack: Attack
    objective: str
    temperature: float
    pixel_std: torch.Tensor  # (1, 3, 1, 1): an ε in normalised units times this is an ε in pixels
    attack_embed: Callable[[torch.Tensor, Route], torch.Tensor]  # images, route -> unit rows, beside the backend

    def contrast(self, a_BD: torch.Tensor, b_BD: torch.Tensor) -> torch.Tensor:
        return contrast_on_global_batch(OBJECTIVES[self.objective], a_BD, b_BD, self.temperature, self.world)

    @property
    def epsilon(self) -> float | torch.Tensor:
        """In pixels of [0, 1]."""
        return self.attack.epsilon if self.attack.unit == "pixel" else self.attack.epsilon * self.pixel_std


@dataclass(frozen=True)
class Pretraining(Attacking):
    """What a step works with."""

    augment: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]  # batch -> x, y: (B, 3, S, S) in [0, 1] on the device
    untouched: Callable[[], AbstractContextManager[None]]  # inside, forwards leave no trace in the model
    attack_statistics: Callable[[], AbstractContextManager[None]]  # the same for the attack, unless it is asked to leave one
    backend: TrainingBackend
    timed: Callable[[str], AbstractContextManager[None]]  # where the time goes


@dataclass(frozen=True)
class StepMetrics:
    """Scalars on the device; losses are this rank's share (their mean over ranks is the global batch's)."""

    loss: torch.Tensor
    clean: torch.Tensor
    adversarial: torch.Tensor | None
    grad_norm: torch.Tensor


def adversarial_view(
    run: Attacking,
    x: torch.Tensor,
    y: torch.Tensor,
    contrast: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Perturbation:
    """The images that raise the loss of the whole global batch the most, within ε of x (or of y: attack.anchor).

    Both embeddings take the adversarial route, and that of the anchor is a constant. At x' = x the positive pair cannot
    get closer, so it is the negatives, on every rank, that drive the attack. `contrast` replaces the global objective.
    """
    contrast = contrast or run.contrast
    if run.attack.anchor == "other":
        start = y
        anchor: torch.Tensor | None = _constant(run, x)
    else:
        start = x
        anchor = _constant(run, x) if run.attack.cost == "original" else None  # exact: z(x') at x' = x is the anchor

    def loss_of(x_try: torch.Tensor) -> torch.Tensor:
        z_try = run.attack_embed(x_try, "adversarial")
        return contrast(z_try.detach() if anchor is None else anchor, z_try)

    return perturb(start, loss_of, run.epsilon, (0.0, 1.0) if run.attack.clip else None)


@torch.no_grad()
def _constant(run: Attacking, x: torch.Tensor) -> torch.Tensor:
    return run.attack_embed(x, "adversarial")


def pretrain_step(run: Pretraining, batch: Any, alpha: float) -> StepMetrics:
    """One update on the global batch: L(z(x), z(y)) + α · L(z(x), z(x_adv)). With α = 0 it is plain SimCLR.

    Raises RankError on every rank when the loss of any is not finite.
    """
    x, y = run.augment(batch)

    if alpha > 0:
        with run.timed("attack"), run.attack_statistics():
            x_adv = adversarial_view(run, x, y).images

    a, b = run.backend.embed(x, "clean"), run.backend.embed(y, "clean")
    loss = clean = run.contrast(a, b)
    adversarial = None
    if alpha > 0:
        c = run.backend.embed(x_adv, "adversarial")
        adversarial = run.contrast(a, c)
        loss = clean + alpha * adversarial

    run.world.agree(
        loss.detach().isfinite(), "the loss is not finite; a lower optim.learning_rate or optim.clip_norm=1 may help"
    )
    run.backend.backward(loss)
    grad_norm = run.backend.update()
    return StepMetrics(loss.detach(), clean.detach(), None if adversarial is None else adversarial.detach(), grad_norm)
