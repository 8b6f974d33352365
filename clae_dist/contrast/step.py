"""The training step, for every method: two views, the method's losses, one backward, one update.

Which losses those are is written in methods/.

# B rows on this rank, N rows on all ranks, D embedding width. x, y two views of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from clae_dist.config.method import Route
from clae_dist.contrast.attacks import Attacking, GradientOf, PairLoss
from clae_dist.contrast.encoding import Embedding, TrainingEncoding
from clae_dist.contrast.interface import Moment, Step, two_views
from clae_dist.contrast.method import Terms
from clae_dist.errors import RankError
from clae_dist.objectives.form import Rows


@dataclass(frozen=True)
class Pretraining(Attacking):
    """The parts of a run that a training step works with."""

    encoding: TrainingEncoding
    shared_norms: bool  # both routes of norm layers are the same function
    augment: Callable[[Any], tuple[torch.Tensor, ...]]  # batch -> views (B, 3, S, S) in [0, 1] on the device: x, y, a third
    timed: Callable[[str], AbstractContextManager[None]]  # accounts for where the time goes
    beside: Callable[[], None]  # called once a step, when the device has all of its forwards and backwards to do


@dataclass(frozen=True)
class StepMetrics:
    """Scalars on the device; losses are this rank's share (their mean over ranks is the global batch's)."""

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]  # the method's, unweighted
    grad_norm: torch.Tensor
    taken: bool = True  # False: the gradient was not finite, and nothing was updated
    attack: dict[str, torch.Tensor] = field(default_factory=dict)  # of the step's first attack: Attacked.measures


class NonFinite(RankError):
    """The loss is not finite: nothing was updated, and gradients are still there."""

    def __init__(self, message: str, metrics: StepMetrics) -> None:
        super().__init__(message)
        self.metrics = metrics


def pretrain_step(
    run: Pretraining, batch: Any, moment: Moment, make_step: Callable[..., TrainingStep] | None = None
) -> StepMetrics:
    """One update on the global batch. Collective.

    Raises NonFinite on every rank when the loss of any is not finite. A gradient that is not is left unused (`taken`).
    """
    s = (make_step or TrainingStep)(run, batch, moment)
    with run.timed("augmentation"):
        x, y, *s.more_views = two_views(run.augment(batch))
    with run.timed("forward"):
        terms = run.method.losses(s, x, y)
        loss = s.total(terms)
    with run.timed("backward"):
        loss.backward()  # as far as the embeddings
        run.encoding.backward(*s.waiting())
    attack = s.attacks[0].measures() if s.attacks else {}
    run.beside()
    with run.timed("update"):
        update = run.encoding.backend.update(loss)
    detached = {name: term.detach() for name, (_, term) in terms.items()}
    metrics = StepMetrics(loss.detach(), detached, update.norm, update.taken, attack)
    if not update.loss_is_finite:
        raise NonFinite(_cause(run, loss, s.embeddings), metrics)
    if run.state and update.taken:
        with torch.no_grad():
            run.method.after_update(s)
    return metrics


class TrainingStep(Step):
    """Records every embedding, so that one backward pass through the encoder serves all losses."""

    run: Pretraining

    def __init__(self, run: Pretraining, batch: Any, moment: Moment) -> None:
        super().__init__(run, batch, moment)
        self.embeddings: list[Embedding] = []
        self._taken: list[torch.Tensor] = []  # losses whose backward has been taken as far as the embeddings
        self._passed: list[Embedding] = []  # embeddings whose backward has been taken

    def embed(self, images: torch.Tensor, route: Route = "clean", *, image_gradient: bool = False) -> Rows:
        beside = self.embeddings[0] if self.embeddings else None
        embedding = self.run.encoding.embed(images, route, want_image_gradient=image_gradient, beside=beside)
        self.embeddings.append(embedding)
        return self.run.contrast.rows(embedding.z)

    def embed_views(self, *clean: torch.Tensor, adversarial: Sequence[torch.Tensor] = ()) -> list[Rows]:
        views: list[tuple[torch.Tensor, Route]] = [(images, "clean") for images in clean]
        views += [(images, "adversarial") for images in adversarial]
        together = self.run.encoding.embed_views(views)
        if together is None:
            return super().embed_views(*clean, adversarial=adversarial)
        self.embeddings += together
        return [self.run.contrast.rows(embedding.z) for embedding in together]

    def classify(self, images: torch.Tensor, route: Route = "clean") -> torch.Tensor:
        first = self.embeddings[0] if self.embeddings else None
        assert first or self.run.method.settings.embeds == "logits", "the first forward of a step reduces the projector: embed"
        embedding = self.run.encoding.embed(images, route, "logits", beside=first)
        self.embeddings.append(embedding)
        return embedding.z

    def embed_constant(self, images: torch.Tensor, route: Route = "clean", *, momentum: bool = False) -> Rows:
        assert not (momentum and self.embeddings), "the momentum encoder comes before the first `embed` of a step"
        return super().embed_constant(images, route, momentum=momentum)

    def can_share_forward(self) -> bool:
        run = self.run
        return (
            run.shared_norms
            and run.attack.num_steps == 1
            and not run.attack.random_start
            and not run.encoding.micro_size
            and run.encoding.backend.shares_forward()
        )

    def reverse_gradients(self, weight: float) -> None:
        self.run.encoding.backend.reverse_gradients(weight)

    def reduction_held(self) -> AbstractContextManager[Any]:
        return self.run.encoding.backend.reduction_held()

    def image_gradient(self, loss: torch.Tensor, rows: Rows) -> torch.Tensor:
        embedding = self._embedding_of(rows)
        loss.backward()  # as far as the embeddings
        self.run.encoding.backward(embedding, more_to_come=True)
        self._taken.append(loss)
        self._passed.append(embedding)
        return embedding.image_gradient

    def total(self, terms: Terms) -> torch.Tensor:
        """Σ weight · loss, where losses whose backward has been taken are constants."""
        weighted = []
        for weight, loss in terms.values():
            taken = any(loss is one for one in self._taken)
            assert weight == 1 or not taken, "the gradient of this loss has been taken with weight 1"
            weighted.append(weight * (loss.detach() if taken else loss))
        return sum(weighted[1:], weighted[0])

    def waiting(self) -> list[Embedding]:
        """Embeddings whose backward through the encoder is still to be taken."""
        return [one for one in self.embeddings if not any(one is other for other in self._passed)]

    def _embedding_of(self, rows: Rows) -> Embedding:
        return next(one for one in self.embeddings if one.z is rows.mine)

    def _timed(self, name: str) -> AbstractContextManager[None]:
        return self.run.timed(name)

    def _gradient_through(self, rows: Rows, loss_of: PairLoss) -> GradientOf:
        embedding = self._embedding_of(rows)

        def loss(z: torch.Tensor) -> torch.Tensor:
            again = self.run.contrast.rows(z)
            return loss_of(again.constant(), again)

        return lambda _: self.run.encoding.input_gradient_of(embedding, loss)


def _cause(run: Pretraining, loss: torch.Tensor, embeddings: list[Embedding]) -> str:
    """The likely cause of a loss that is non-finite on some rank, the same on every rank. Collective.

    With global negatives all ranks see a non-finite loss: the message names the ranks whose own embeddings are non-finite,
    those of clean views first.
    """
    try:
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
    except RankError as error:
        return str(error)
    return "the loss is not finite"
