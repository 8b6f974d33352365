"""Attacks of a step: which images are moved, against which loss, and how their gradient is found.

# B rows on this rank, V views. An attack knows the encoder and the objective; how far it may go is adversary.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from clae_dist.config import Attack
from clae_dist.config.method import Route
from clae_dist.contrast.adversary import Ball, LossAndGradient, Perturbation, perturb
from clae_dist.contrast.distributed import Contrast
from clae_dist.contrast.encoding import Encoding
from clae_dist.contrast.method import Method, State
from clae_dist.objectives.form import Rows
from clae_dist.world import World

GradientOf = Callable[[torch.Tensor], LossAndGradient]
PairLoss = Callable[[Rows, Rows], torch.Tensor]  # (anchor, attacked) -> loss of this rank's anchors
ViewsLoss = Callable[[Sequence[Rows]], torch.Tensor]  # attacked views -> loss of this rank's images
ImagesOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (start, images found) of an attacked view -> images
ALL = slice(None)


@dataclass(frozen=True)
class Attacking:
    """The parts of a run that embed, contrast and attack images."""

    world: World
    method: Method
    attack: Attack
    contrast: Contrast  # the objective on the rows of all ranks
    encoding: Encoding  # images and route -> embeddings, under the parallel backend
    pixel_std: torch.Tensor  # (1, 3, 1, 1): an ε in normalised units times this is an ε in pixels
    noise: Callable[[Any, int], torch.Tensor]  # batch, number of a view -> uniform in [0, 1), of x's shape: for a random start
    state: State  # the method's
    pseudo_labels: torch.Tensor  # (images of the split, clusterings): see Step.pseudo_labels

    @property
    def ball(self) -> Ball:
        """The images that an attack may reach, in pixels of [0, 1]."""
        attack = self.attack
        return Ball(self._in_pixels(attack.epsilon), attack.norm, (0.0, 1.0) if attack.clip else None, attack.clip_start)

    @property
    def step_length(self) -> float | torch.Tensor:
        """Length of one step of the attack, in pixels of [0, 1]."""
        return self._in_pixels(self.attack.length_of_step)

    def attack_forwards(self) -> AbstractContextManager[None]:
        """Context of an attack's forwards: which statistics they use and change, by attack.statistics."""
        backend = self.encoding.backend
        return {"untouched": backend.untouched, "running": backend.evaluating, "updated": nullcontext}[self.attack.statistics]()

    def _in_pixels(self, length: float) -> float | torch.Tensor:
        return length if self.attack.unit == "pixel" else length * self.pixel_std


@dataclass(frozen=True)
class Attacked:
    """The result of an attack of a step. `found` has the loss and gradient (of this rank's images, unscaled) at its start."""

    start: torch.Tensor
    found: Perturbation
    loss_at: Callable[[ImagesOf], torch.Tensor] | None  # the loss that it raised, elsewhere; None: it took a known gradient


class Attacks:
    """The part of a step that attacks images."""

    def __init__(self, run: Attacking, batch: Any) -> None:
        self.run, self._batch = run, batch
        self.attacks: list[Attacked] = []

    def attack(
        self,
        start: torch.Tensor,
        loss_of: PairLoss,
        *,
        anchor: torch.Tensor,
        rows: Any = ALL,
        route: Route = "adversarial",
        through: Rows | None = None,
        live_anchor: bool = False,
    ) -> torch.Tensor:
        """The images within ε of `start` that raise loss_of(z(anchor), z(images)), of the whole global batch, the most.

        Collective. Parameters get no gradient, and z(anchor) is a constant.

        Args:
            anchor: images whose embedding is the constant; `start` itself costs no forward.
            rows: index of the images of the batch that `start` holds (see `choose`).
            through: rows of `start`, embedded with `image_gradient`: their graph serves the attack (see `can_share_forward`).
            live_anchor: embed the anchor with a graph in each step and compute weight gradients, as the paper's code does.
        """
        run, attack = self.run, self.run.attack
        with self._timed("attack"), nullcontext() if through is not None else self.attack_forwards():
            noise = run.noise(self._batch, 0)[rows] if attack.random_start else None
            if through is not None:
                gradient_of = self._gradient_through(through, loss_of)
            elif live_anchor:
                gradient_of = self._gradient_with_weights(anchor, route, loss_of)
            else:
                apart = anchor is not start or noise is not None
                constant = self._look(anchor, route) if apart else None
                gradient_of = self._gradient(constant, route, loss_of)
            with nullcontext() if through is not None else run.encoding.backend.frozen():
                steps, length = attack.num_steps, run.step_length
                found = perturb(start, gradient_of, run.ball, steps=steps, step_length=length, noise=noise)
            return self._record(
                Attacked(
                    start,
                    found,
                    lambda images_of: loss_of(self._look(anchor, route), self._look(images_of(start, found.images), route)),
                )
            )

    def attack_views(
        self,
        starts: Sequence[torch.Tensor],
        loss_of: ViewsLoss,
        *,
        route: Route = "adversarial",
        noise_of: int = 0,
        keys: bool = False,
    ) -> list[torch.Tensor]:
        """The images within ε of each view's `starts` (B, 3, S, S) that together raise loss_of(embeddings of all views), of the
        whole global batch, the most. Collective. Parameters get no gradient.

        The views are embedded as one batch of V·B images. Views that are not attacked are constants of `loss_of`.

        Args:
            keys: the last view is embedded by the momentum encoder, through which its images have a gradient.
            noise_of: number of the noise that the first view starts from; the others have those that follow.
        """
        run, attack, num_views = self.run, self.run.attack, len(starts)

        with self._timed("attack"), self.attack_forwards(), run.encoding.backend.frozen():
            noise = None
            if attack.random_start:
                noise = torch.cat([run.noise(self._batch, noise_of + view) for view in range(num_views)])
            found = perturb(
                torch.cat(list(starts)),
                lambda images: self._views_gradient(images.chunk(num_views), route, loss_of, keys=keys),
                run.ball,
                steps=attack.num_steps,
                step_length=run.step_length,
                noise=noise,
            )
        views = [part.chunk(num_views) for part in (found.images, found.gradient)]

        def loss_at(images_of: ImagesOf) -> torch.Tensor:
            parts = [images_of(*pair) for pair in zip(starts, views[0], strict=True)]
            last = [self.run.contrast.rows(self.run.encoding.keys(parts[-1], route))] if keys else []
            return loss_of([self._look(images, route) for images in parts[: num_views - keys]] + last)

        return [
            self._record(Attacked(start, Perturbation(images, found.loss_before, gradient), loss_at))
            for start, images, gradient in zip(starts, *views, strict=True)
        ]

    def attack_logits(
        self,
        start: torch.Tensor,
        loss_of: Callable[[torch.Tensor], torch.Tensor],
        *,
        route: Route = "classified",
        noise_of: int = 0,
    ) -> torch.Tensor:
        """The images within ε of `start` that raise loss_of(logits of the classifiers on the features), of the whole global
        batch, the most. Collective. Parameters get no gradient.

        Args:
            noise_of: number of the noise that the images start from.
        """
        run, encoding = self.run, self.run.encoding
        with self._timed("attack"), self.attack_forwards(), encoding.backend.frozen():
            found = perturb(
                start,
                lambda images: encoding.input_gradient(images, route, loss_of, "logits"),
                run.ball,
                steps=run.attack.num_steps,
                step_length=run.step_length,
                noise=run.noise(self._batch, noise_of) if run.attack.random_start else None,
            )

        def loss_at(images_of: ImagesOf) -> torch.Tensor:
            return loss_of(encoding.constant(images_of(start, found.images), route, "logits"))

        return self._record(Attacked(start, found, loss_at))

    def move(self, start: torch.Tensor, gradient: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """One step of the attack from `start` along a `gradient` of `loss` that is known already."""
        with self._timed("attack"):
            images = self.run.ball.step(start, start, gradient, self.run.step_length)
            return self._record(Attacked(start, Perturbation(images, loss.detach(), gradient), None))

    def can_share_forward(self) -> bool:
        """True if a training forward along the clean route can serve an attack (`attack(through=…)`): the adversarial route is
        the same function, the attack takes one step from the images themselves, and the graph survives its use."""
        return False

    def attack_forwards(self) -> AbstractContextManager[None]:
        """Context of forwards that belong to an attack, such as of an image that it moves away from (attack.statistics)."""
        return self.run.attack_forwards()

    # ---- parts of an attack ----

    def _record(self, attacked: Attacked) -> torch.Tensor:
        self.attacks.append(attacked)
        return attacked.found.images

    def _timed(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def _look(self, images: torch.Tensor, route: Route) -> Rows:
        return self.run.contrast.rows(self.run.encoding.constant(images, route))

    def _views_gradient(
        self, views: Sequence[torch.Tensor], route: Route, loss_of: ViewsLoss, *, keys: bool
    ) -> LossAndGradient:
        encoding, rows_of = self.run.encoding, self.run.contrast.rows
        online, last = (views[:-1], views[-1]) if keys else (views, None)
        last_z = None if last is None else [encoding.keys(last, route)]
        online_z: list[torch.Tensor] = []

        def loss(z: torch.Tensor) -> torch.Tensor:
            online_z[:] = z.detach().chunk(len(online))
            return loss_of([rows_of(rows.contiguous()) for rows in (*z.chunk(len(online)), *(last_z or ()))])

        value, gradient = encoding.input_gradient(torch.cat(list(online)), route, loss)
        if last is None:
            return value, gradient
        with encoding.backend.key_encoder():  # a second forward: the graph of the first would not outlive the context
            _, of_last = encoding.input_gradient(
                last, route, lambda z: loss_of([rows_of(rows.contiguous()) for rows in (*online_z, z)])
            )
        return value, torch.cat([gradient, of_last])

    def _gradient(self, anchor: Rows | None, route: Route, loss_of: PairLoss) -> GradientOf:
        def loss(z: torch.Tensor) -> torch.Tensor:
            nonlocal anchor
            rows = self.run.contrast.rows(z)
            if anchor is None:  # the first step is at the anchor itself
                anchor = rows.constant()
            return loss_of(anchor, rows)

        return lambda images: self.run.encoding.input_gradient(images, route, loss)

    def _gradient_through(self, rows: Rows, loss_of: PairLoss) -> GradientOf:
        raise NotImplementedError("only a training forward can serve an attack")

    def _gradient_with_weights(self, anchor: torch.Tensor, route: Route, loss_of: PairLoss) -> GradientOf:
        backend, contrast = self.run.encoding.backend, self.run.contrast

        def gradient_of(images: torch.Tensor) -> LossAndGradient:
            x_try = images.detach().requires_grad_()
            with torch.enable_grad():
                constant, z = backend.attack_embed(anchor, route), backend.attack_embed(x_try, route)
                loss = loss_of(contrast.rows(constant), contrast.rows(z))
                weights = [parameter for parameter in backend.parameters() if parameter.requires_grad]
                gradient, *_ = torch.autograd.grad(loss, [x_try, *weights], allow_unused=True)
            return loss.detach(), gradient

        return gradient_of
