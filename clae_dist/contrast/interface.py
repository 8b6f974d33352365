"""`Step`: all that a method may use to embed, contrast and attack images.

# B rows on this rank, N rows on all ranks, D embedding width. x, y two views of the images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from clae_dist.config import Attack
from clae_dist.contrast.adversary import Ball, LossAndGradient, Perturbation, perturb
from clae_dist.contrast.distributed import Contrast
from clae_dist.contrast.encoding import Encoding, Route
from clae_dist.contrast.method import Method, State
from clae_dist.objectives.form import Rows
from clae_dist.objectives.multi_view import ViewPairs
from clae_dist.world import World

GradientOf = Callable[[torch.Tensor], LossAndGradient]
PairLoss = Callable[[Rows, Rows], torch.Tensor]  # (anchor, attacked) -> loss of this rank's anchors
ViewsLoss = Callable[[Sequence[Rows]], torch.Tensor]  # attacked views -> loss of this rank's images
_ALL = slice(None)


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

    @property
    def ball(self) -> Ball:
        """The images that an attack may reach, in pixels of [0, 1]."""
        attack = self.attack
        return Ball(self._in_pixels(attack.epsilon), attack.norm, (0.0, 1.0) if attack.clip else None, attack.clip_start)

    @property
    def step_length(self) -> float | torch.Tensor:
        """Length of one step of the attack, in pixels of [0, 1]."""
        return self._in_pixels(self.attack.length_of_step)

    def attack_statistics(self) -> AbstractContextManager[None]:
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
    loss_after: Callable[[], torch.Tensor] | None  # of the loss that it raised, at its end; None: it took a known gradient


@dataclass(frozen=True)
class Moment:
    """Where in a run a step is: `step` steps were taken before."""

    step: int = 0
    steps_per_epoch: int = 1


class Step(ABC):
    """One step as a method sees it. What it did is recorded for the tools that look at a step."""

    def __init__(self, run: Attacking, batch: Any, moment: Moment) -> None:
        self.run, self._batch, self.moment = run, batch, moment
        self.attacks: list[Attacked] = []
        self.kept: State = {}  # by `losses` for `after_update`

    @property
    def state(self) -> State:
        """The method's tensors that outlive a step (see Method.state)."""
        return self.run.state

    @property
    def step(self) -> int:
        """Number of steps taken before this one."""
        return self.moment.step

    @property
    def epoch(self) -> float:
        """Number of epochs before this step."""
        return self.moment.step / self.moment.steps_per_epoch

    def steps(self, epochs: float) -> int:
        """Number of steps in so many epochs."""
        return round(epochs * self.moment.steps_per_epoch)

    @property
    def ids(self) -> torch.Tensor:
        """Index of each sample in its split, (B,)."""
        ids: torch.Tensor = self._batch.ids
        return ids

    @property
    def labels(self) -> torch.Tensor:
        """Label of each sample, -1 without one, (B,)."""
        labels: torch.Tensor = self._batch.labels
        return labels

    # ---- embeddings and losses ----

    @abstractmethod
    def embed(self, images: torch.Tensor, route: Route = "clean", image_gradient: bool = False) -> Rows:
        """Rows of `images`, trained: gradients of every loss on them reach the encoder. Collective.

        They are projections of unit length, or features as they are (MethodSettings.embeds).
        With `image_gradient` the rows can serve `attack(through=…)` or `image_gradient` later.
        """

    def embed_constant(self, images: torch.Tensor, route: Route = "clean", momentum: bool = False) -> Rows:
        """Rows of `images` without gradients; running statistics are not updated. Collective.

        With `momentum`, by the momentum encoder or the frozen one (MethodSettings.key_decay), which uses no batch statistics.
        """
        if momentum:
            return self.run.contrast.rows(self.run.encoding.keys(images, route))
        with self.run.encoding.backend.untouched():
            return self.run.contrast.rows(self.run.encoding.constant(images, route))

    def contrast(self, anchors: Rows, keys: Rows) -> torch.Tensor:
        """The objective of the run: this rank's share, the mean over its anchors. Collective."""
        return self.run.contrast(anchors, keys)

    def contrast_views(self, views: Sequence[Rows], pairs: ViewPairs) -> torch.Tensor:
        """The loss `pairs` on V views: this rank's share, the mean over its images. Collective if pairs are live.

        It has the temperature of the run's objective, and no other of its settings.
        """
        return self.run.contrast.of_views(pairs, views)

    def match(
        self, queries: Rows, keys: Rows, queue_KD: torch.Tensor | None, *, with_batch: bool, index: Any = _ALL
    ) -> torch.Tensor:
        """The mean over this rank's queries of the cross-entropy of a query's similarity to its own key, among that key, the
        rows of the queue and, `with_batch`, the keys of all other images of the global batch.

        Keys and queue are constants: a query has the gradient of its own term alone, and no gradient returns from other ranks.

        Args:
            index: the images of `keys` that the queries are of (see `choose`).
        Reference: He et al. 2020, equation 1.
        """
        return self.run.contrast.match(queries.mine, keys, queue_KD, with_batch=with_batch, index=index)

    def choose(self, count: int, num_rows: int) -> Any:
        """An index of `count` of this rank's `num_rows` rows, evenly spaced: the same images for every number of ranks."""
        return evenly_spaced(count, num_rows, self.run.pixel_std.device)

    def select(self, rows: Rows, index: Any) -> Rows:
        """The rows at `index` (see `choose`) of every rank."""
        if isinstance(index, slice):
            return rows
        all_ND = rows.all.view(-1, len(rows.mine), rows.all.shape[1])[:, index]
        return Rows(rows.mine[index], all_ND.reshape(-1, rows.all.shape[1]))

    @abstractmethod
    def image_gradient(self, loss: torch.Tensor, rows: Rows) -> torch.Tensor:
        """∂ loss / ∂ images of `rows`, from the backward of `loss` that the step needs anyway. Use within `reduction_held`.

        The weight of `loss` in the step's total must be 1.
        """

    def reduction_held(self) -> AbstractContextManager[Any]:
        """Inside, an early backward (`image_gradient`) reduces no gradients over ranks: the step's last one does, once."""
        return nullcontext()

    # ---- attacks ----

    def attack(
        self,
        start: torch.Tensor,
        loss_of: PairLoss,
        *,
        anchor: torch.Tensor,
        rows: Any = _ALL,
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
                Attacked(start, found, lambda: loss_of(self._look(anchor, route), self._look(found.images, route)))
            )

    def attack_views(
        self, starts: Sequence[torch.Tensor], loss_of: ViewsLoss, *, route: Route = "adversarial", noise_of: int = 0
    ) -> list[torch.Tensor]:
        """The images within ε of each view's `starts` (B, 3, S, S) that together raise loss_of(embeddings of all views), of the
        whole global batch, the most. Collective. Parameters get no gradient.

        The views are embedded as one batch of V·B images. Views that are not attacked are constants of `loss_of`.

        Args:
            noise_of: number of the noise that the first view starts from; the others have those that follow.
        """
        run, attack, num_views = self.run, self.run.attack, len(starts)

        def loss(z: torch.Tensor) -> torch.Tensor:
            return loss_of([run.contrast.rows(rows.contiguous()) for rows in z.chunk(num_views)])

        with self._timed("attack"), self.attack_forwards(), run.encoding.backend.frozen():
            noise = None
            if attack.random_start:
                noise = torch.cat([run.noise(self._batch, noise_of + view) for view in range(num_views)])
            found = perturb(
                torch.cat(list(starts)),
                lambda images: run.encoding.input_gradient(images, route, loss),
                run.ball,
                steps=attack.num_steps,
                step_length=run.step_length,
                noise=noise,
            )
        views = [part.chunk(num_views) for part in (found.images, found.gradient)]

        def loss_after() -> torch.Tensor:
            return loss_of([self._look(images, route) for images in views[0]])

        return [
            self._record(Attacked(start, Perturbation(images, found.loss_before, gradient), loss_after))
            for start, images, gradient in zip(starts, *views, strict=True)
        ]

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
        return self.run.attack_statistics()

    # ---- parts of an attack ----

    def _record(self, attacked: Attacked) -> torch.Tensor:
        self.attacks.append(attacked)
        return attacked.found.images

    def _timed(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def _look(self, images: torch.Tensor, route: Route) -> Rows:
        return self.run.contrast.rows(self.run.encoding.constant(images, route))

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


def evenly_spaced(count: int, num_rows: int, device: torch.device | None = None) -> Any:
    """Row i where (i + 1) · count / num_rows reaches the next integer; made on the device, so that nothing waits for it."""
    if count == num_rows:
        return _ALL
    return (torch.arange(1, count + 1, device=device) * num_rows + count - 1) // count - 1
