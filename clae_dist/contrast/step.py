"""The training step: whoever opens this file reads the paper's algorithm (Ho & Vasconcelos 2020, algorithm 1).

# B rows on this rank, N rows on all ranks, D embedding width. x, y two views; a, b, c embeddings of x, y, x_adv.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from clae_dist.config import Attack
from clae_dist.contrast.adversary import Ball, LossAndGradient, Perturbation, perturb
from clae_dist.contrast.distributed import Contrast
from clae_dist.contrast.encoding import Embedding, Encoding, TrainingEncoding
from clae_dist.objectives.form import Rows
from clae_dist.world import RankError, World


@dataclass(frozen=True)
class Attacking:
    """What an attack works with."""

    world: World
    attack: Attack
    contrast: Contrast  # the objective on the rows of all ranks
    encoding: Encoding  # images and route -> embeddings, under the parallel backend
    pixel_std: torch.Tensor  # (1, 3, 1, 1): an ε in normalised units times this is an ε in pixels

    @property
    def ball(self) -> Ball:
        """In pixels of [0, 1]."""
        return Ball(self._in_pixels(self.attack.epsilon), self.attack.norm, (0.0, 1.0) if self.attack.clip else None)

    @property
    def step_length(self) -> float | torch.Tensor:
        """Of the attack, in pixels of [0, 1]."""
        return self._in_pixels(self.attack.length_of_step)

    def _in_pixels(self, length: float) -> float | torch.Tensor:
        return length if self.attack.unit == "pixel" else length * self.pixel_std


@dataclass(frozen=True)
class Pretraining(Attacking):
    """What a step works with."""

    encoding: TrainingEncoding
    shared_norms: bool  # both routes are the same function: the attack may use the clean forward of x
    augment: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]  # batch -> x, y: (B, 3, S, S) in [0, 1] on the device
    noise: Callable[[Any], torch.Tensor]  # batch -> uniform in [0, 1), of x's shape: for a random start
    attack_statistics: Callable[[], AbstractContextManager[None]]  # no trace in running statistics, unless asked for one
    timed: Callable[[str], AbstractContextManager[None]]  # where the time goes


@dataclass(frozen=True)
class StepMetrics:
    """Scalars on the device; losses are this rank's share (their mean over ranks is the global batch's)."""

    loss: torch.Tensor
    clean: torch.Tensor
    adversarial: torch.Tensor | None
    grad_norm: torch.Tensor


class NonFinite(RankError):
    """The loss is not finite: nothing was updated, gradients are still there, and `metrics` has no grad_norm."""

    def __init__(self, message: str, metrics: StepMetrics) -> None:
        super().__init__(message)
        self.metrics = metrics


def pretrain_step(run: Pretraining, batch: Any, alpha: float) -> StepMetrics:
    """One update on the global batch: L(z(x), z(y)) + α · L(z(x), z(x_adv)). With α = 0 it is plain SimCLR.

    Raises NonFinite on every rank when the loss of any is not finite. A gradient that is not is left unused (`grad_norm`).
    """
    x, y = run.augment(batch)
    if alpha > 0 and run.attack.cost == "fused":
        return _fused_step(run, x, y, alpha)
    attacked = attacked_rows(run.attack, len(x), x.device) if alpha > 0 else slice(0)
    share = alpha > 0 and shares_clean_forward(run)

    if alpha > 0 and not share:
        with run.timed("attack"), run.attack_statistics():
            noise = run.noise(batch)[attacked] if run.attack.random_start else None
            x_adv = adversarial_view(run, x[attacked], y[attacked], noise=noise).images

    a = run.encoding.embed(x, "clean", want_image_gradient=share)
    rows_a = run.contrast.rows(a.z)
    if share:
        with run.timed("attack"):
            x_adv = _attack_through(run, a, x)
    b = run.encoding.embed(y, "clean")
    loss = clean = run.contrast(rows_a, run.contrast.rows(b.z))
    embeddings, adversarial = [a, b], None
    if alpha > 0:
        c = run.encoding.embed(x_adv, "adversarial", beside=a)
        adversarial = run.contrast(_choose(rows_a, attacked, run.world.size), run.contrast.rows(c.z))
        loss = clean + alpha * adversarial
        embeddings.append(c)

    loss.backward()  # as far as the embeddings
    run.encoding.backward(*embeddings)
    return _update(run, embeddings, loss, clean, adversarial)


def _fused_step(run: Pretraining, x: torch.Tensor, y: torch.Tensor, alpha: float) -> StepMetrics:
    """The attack is the clean loss's gradient in y, which the clean backward passes by: one forward and no backward more.

    Not the paper's attack: it is anchored at the other view and takes the clean route. Gradients are reduced once, at the end.
    """
    attacked = attacked_rows(run.attack, len(x), x.device)
    with run.encoding.backend.reduction_held():
        a, b = run.encoding.embed(x, "clean"), run.encoding.embed(y, "clean", want_image_gradient=True)
        rows_a = run.contrast.rows(a.z)
        clean = run.contrast(rows_a, run.contrast.rows(b.z))
        clean.backward()  # as far as the embeddings
        run.encoding.backward(b, more_to_come=True)
    with run.timed("attack"):
        gradient = b.image_gradient[attacked]
        y_adv = run.ball.step(y[attacked], y[attacked], gradient, run.step_length)
    c = run.encoding.embed(y_adv, "adversarial", beside=a)
    adversarial = run.contrast(_choose(rows_a, attacked, run.world.size), run.contrast.rows(c.z))
    loss = clean.detach() + alpha * adversarial
    (alpha * adversarial).backward()
    run.encoding.backward(a, c)
    return _update(run, [a, b, c], loss, clean, adversarial)


def _update(
    run: Pretraining, embeddings: list[Embedding], loss: torch.Tensor, clean: torch.Tensor, adversarial: torch.Tensor | None
) -> StepMetrics:
    attacked = None if adversarial is None else adversarial.detach()
    metrics = StepMetrics(loss.detach(), clean.detach(), attacked, loss.new_tensor(torch.nan))
    try:
        _agree_on_finite(run, loss, embeddings)
    except RankError as error:
        raise NonFinite(str(error), metrics) from None
    return replace(metrics, grad_norm=run.encoding.backend.update())


# ---- the attack ----


def adversarial_view(
    run: Attacking, x: torch.Tensor, y: torch.Tensor, *, noise: torch.Tensor | None = None, contrast: Contrast | None = None
) -> Perturbation:
    """The images that raise the loss of the whole global batch the most, within ε of x (or of y: attack.anchor).

    Both embeddings take the adversarial route (fused: the clean one), and that of the anchor is a constant. At x' = x the
    positive pair cannot get closer, so it is the negatives, on every rank, that drive the attack. `contrast` replaces the
    global objective.
    """
    contrast, attack = contrast or run.contrast, run.attack
    route: Any = "clean" if attack.cost == "fused" else "adversarial"
    start = y if attack.anchor == "other" else x
    anchor: Rows | None = None
    if attack.cost != "original" and (attack.anchor == "other" or noise is not None):
        anchor = contrast.rows(run.encoding.constant(x, route))

    def loss_of(z: torch.Tensor) -> torch.Tensor:
        nonlocal anchor
        rows = contrast.rows(z)
        if anchor is None:  # the first step is at x' = x: its embedding is the anchor's
            anchor = rows.constant()
        return contrast(anchor, rows)

    def gradient_of(images: torch.Tensor) -> LossAndGradient:
        if attack.cost == "original":
            return _original_gradient(run, contrast, x, images)
        return run.encoding.input_gradient(images, route, loss_of)

    with run.encoding.backend.frozen():
        return perturb(start, gradient_of, run.ball, steps=attack.num_steps, step_length=run.step_length, noise=noise)


def _original_gradient(run: Attacking, contrast: Contrast, x: torch.Tensor, images: torch.Tensor) -> LossAndGradient:
    """As the paper's code has it: both embeddings with a graph, weight gradients computed and thrown away."""
    backend = run.encoding.backend
    x_try = images.detach().requires_grad_()
    with torch.enable_grad():
        anchor, z = backend.attack_embed(x, "adversarial"), backend.attack_embed(x_try, "adversarial")
        loss = contrast(contrast.rows(anchor), contrast.rows(z))
        weights = [parameter for parameter in backend.parameters() if parameter.requires_grad]
        gradient, *_ = torch.autograd.grad(loss, [x_try, *weights], allow_unused=True)
    return loss.detach(), gradient


def shares_clean_forward(run: Pretraining) -> bool:
    """Whether the clean forward of x may serve the attack: it is the same function, and its graph can be used twice."""
    attack = run.attack
    return (
        run.shared_norms
        and attack.cost == "exact"
        and attack.anchor == "same"
        and attack.num_steps == 1
        and attack.fraction == 1
        and not attack.random_start
        and not run.encoding.micro_size
        and run.encoding.backend.shares_forward()
    )


def _attack_through(run: Pretraining, a: Embedding, x: torch.Tensor) -> torch.Tensor:
    def loss_of(z: torch.Tensor) -> torch.Tensor:
        rows = run.contrast.rows(z)
        return run.contrast(rows.constant(), rows)

    return perturb(x, lambda _: run.encoding.input_gradient_of(a, loss_of), run.ball, step_length=run.step_length).images


def attacked_rows(attack: Attack, num_rows: int, device: torch.device | None = None) -> Any:
    """Which of a rank's rows have an adversarial view: every so many, so that no number of ranks changes which."""
    count = attack.rows(num_rows)
    if count == num_rows:
        return slice(None)
    # Row i where (i + 1) · count / num_rows reaches the next whole number; made on the device, which then need not wait.
    return (torch.arange(1, count + 1, device=device) * num_rows + count - 1) // count - 1


def _choose(rows: Rows, chosen: Any, world_size: int) -> Rows:
    """The chosen rows of every rank."""
    if isinstance(chosen, slice):
        return rows
    everyone = rows.all.view(world_size, -1, rows.all.shape[1])[:, chosen]
    return Rows(rows.mine[chosen], everyone.reshape(-1, rows.all.shape[1]))


# ---- together or not at all ----


def _agree_on_finite(run: Pretraining, loss: torch.Tensor, embeddings: list[Embedding]) -> None:
    """Raises RankError on every rank unless the loss is finite everywhere. With global negatives all ranks see a number that
    is not: the message names those whose own embeddings are not finite, those of clean views first."""
    if not run.world.flags_anywhere(~loss.detach().isfinite())[0]:
        return
    for embedding in embeddings:
        run.world.agree(
            embedding.z.detach().isfinite().all(),
            f"the loss is not finite: embeddings of a view ({embedding.route} route) are not; "
            "a lower optim.learning_rate or optim.clip_norm=1 may help; this step was not saved",
        )
    run.world.agree(
        loss.detach().isfinite(),
        "the loss is not finite, though all embeddings are; a higher objective.temperature or train.precision may help",
    )
