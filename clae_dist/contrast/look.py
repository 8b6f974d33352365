"""A step that trains nothing: the method's losses on constant embeddings, with all pairs and attacks recorded.

# B rows on this rank, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from clae_dist.config.method import Route
from clae_dist.contrast.attacks import Attacked, Attacking
from clae_dist.contrast.interface import Moment, Step, two_views
from clae_dist.objectives.form import Rows


@dataclass(frozen=True)
class Embedded:
    """Rows with the images and the route that they come from."""

    rows: Rows
    images: torch.Tensor
    route: Route


@dataclass(frozen=True)
class Pair:
    """Two sets of rows that the method's loss contrasts."""

    anchors: Rows
    keys: Rows
    route: Route  # of the keys
    loss: torch.Tensor


class Look(Step):
    """`look` runs a method's losses; `embedded`, `pairs` and `attacks` then hold what it embedded, contrasted
    and attacked, in order."""

    def __init__(self, run: Attacking, batch: Any) -> None:
        super().__init__(run, batch, Moment())
        self.embedded: list[Embedded] = []
        self.pairs: list[Pair] = []

    def embed(self, images: torch.Tensor, route: Route = "clean", *, image_gradient: bool = False) -> Rows:
        rows = self._look(images, route)
        self.embedded.append(Embedded(rows, images, route))
        return rows

    def classify(self, images: torch.Tensor, route: Route = "clean") -> torch.Tensor:
        return self.run.encoding.constant(images, route, "logits")

    def contrast(self, anchors: Rows, keys: Rows) -> torch.Tensor:
        loss = super().contrast(anchors, keys)
        route = next((one.route for one in self.embedded if one.rows is keys), None)
        if route is not None:  # not an attempt of an attack
            self.pairs.append(Pair(anchors, keys, route, loss))
        return loss

    def image_gradient(self, loss: torch.Tensor, rows: Rows) -> torch.Tensor:
        pair = next(pair for pair in self.pairs if pair.loss is loss)
        embedded = next(one for one in self.embedded if one.rows is rows)

        def loss_of(z: torch.Tensor) -> torch.Tensor:
            return self.run.contrast(pair.anchors, self.run.contrast.rows(z))

        return self.run.encoding.input_gradient(embedded.images, embedded.route, loss_of)[1]

    def loss_after(self, attacked: Attacked) -> torch.Tensor:
        """The loss that the attack raised, at the images that it found; for one that took the gradient of another loss, the
        first loss along the adversarial route. Collective."""
        if attacked.loss_at is None:
            return next(pair.loss for pair in self.pairs if pair.route != "clean")
        with self.attack_forwards():
            return attacked.loss_at(lambda start, found: found)

    def loss_under_noise(self, attacked: Attacked) -> torch.Tensor | None:
        """The loss that the attack raised, where every pixel moves as far as in the attack, up or down by chance. None for an
        attack that took the gradient of another loss. Collective."""
        if attacked.loss_at is None:
            return None
        up_BCHW = self.run.noise(self._batch, 0) < 0.5

        def moved(start: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
            length = (found - start).abs()
            return self.run.ball.inside(start + torch.where(up_BCHW[: len(start)], length, -length))

        with self.attack_forwards():
            return attacked.loss_at(moved)


def look(run: Attacking, batch: Any, *views: torch.Tensor) -> Look:
    """Run the method's losses on the views as they are from the first step on, and train nothing. Collective.

    The caller protects running statistics.
    """
    seen = Look(run, batch)
    x, y, *more = two_views(views)
    seen.more_views += more
    run.method.from_the_start().losses(seen, x, y)
    return seen
