"""Embeddings with a cut behind them: first the loss's gradient in the embeddings, then through the encoder.

# B rows on this rank, m rows at a time (batch.micro_size), D embedding width.

Cut there, a global batch larger than memory keeps all its negatives (GradCache, Gao et al. 2021): the first pass embeds m
rows at a time and keeps no graph; when the gradient of every embedding is known, each m rows are embedded again, with a
graph, and their part is taken back through it. It is exact, with dropout as well (the second pass draws what the first
drew), but for batch statistics: those are of m rows (of all ranks, if model.norm is "global"), in both passes the same, and
only the second counts in the running statistics. With m = B there is one pass, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from clae_dist.config.method import Output, Route, Views
from clae_dist.contrast.adversary import LossAndGradient

LossOf = Callable[[torch.Tensor], torch.Tensor]


class AttackedModel(Protocol):
    """Interface of a model for attacks."""

    def attack_embed(self, images: torch.Tensor, route: Route, **how: Any) -> torch.Tensor: ...
    def key_encoder(self) -> AbstractContextManager[None]: ...
    def untouched(self) -> AbstractContextManager[None]: ...
    def evaluating(self) -> AbstractContextManager[None]: ...
    def frozen(self) -> AbstractContextManager[None]: ...
    def parameters(self) -> Iterable[torch.Tensor]: ...


@dataclass(frozen=True)
class Update:
    """The outcome of a step: the gradient's norm before clipping, and whether the weights were updated."""

    norm: torch.Tensor
    loss_is_finite: bool  # on every rank
    taken: bool


class TrainingBackend(AttackedModel, Protocol):
    """Interface of a parallel backend (clae_dist/parallel) for the step."""

    def embed(self, images: torch.Tensor, route: Route | Views, output: Output = "projections") -> torch.Tensor: ...
    def joins_views(self) -> bool: ...
    def shares_forward(self) -> bool: ...
    def reduction_held(self) -> AbstractContextManager[Any]: ...
    def reverse_gradients(self, weight: float) -> None: ...
    def backward(self, loss: torch.Tensor) -> None: ...
    def update(self, loss: torch.Tensor | None = None) -> Update: ...


@dataclass(frozen=True)
class _Part:
    """Rows that were embedded together: their graph, or what it takes to embed them again."""

    images: torch.Tensor
    graph: torch.Tensor | None
    random: list[torch.Tensor]


@dataclass(frozen=True)
class Embedding:
    """The embeddings, or logits, of images along a route. `z` is a leaf: a loss's backward stops there and leaves `z.grad`."""

    z: torch.Tensor
    route: Route
    parts: tuple[_Part, ...]
    output: Output = "projections"

    @property
    def image_gradient(self) -> torch.Tensor:
        """After a backward, of images that were embedded with `want_image_gradient`: (B, 3, S, S)."""
        grads = [part.images.grad for part in self.parts]
        return torch.cat([grad for grad in grads if grad is not None])


class Encoding:
    """An encoder that is attacked, m rows at a time; m = 0: all at once."""

    def __init__(self, backend: AttackedModel, micro_size: int = 0) -> None:
        self.backend, self.micro_size = backend, micro_size

    def constant(self, images: torch.Tensor, route: Route, output: Output = "projections") -> torch.Tensor:
        """The model's output without a graph."""
        with torch.no_grad():
            return torch.cat([self.backend.attack_embed(part, route, output=output) for part in self._split(images)])

    def regions(self, images: torch.Tensor, boxes_BL4: torch.Tensor, route: Route) -> torch.Tensor:
        """Embeddings (B, L, D) of regions of the images, without a graph."""
        parts = zip(self._split(images), self._split(boxes_BL4), strict=True)
        with torch.no_grad():
            rows = torch.cat([self.backend.attack_embed(part, route, boxes_BL4=boxes) for part, boxes in parts])
        return rows.view(*boxes_BL4.shape[:2], -1)

    def keys(self, images: torch.Tensor, route: Route) -> torch.Tensor:
        """Embeddings by the momentum encoder, without a graph."""
        with self.backend.key_encoder():
            return self.constant(images, route)

    def input_gradient(
        self, images: torch.Tensor, route: Route, loss_of: LossOf, output: Output = "projections"
    ) -> LossAndGradient:
        """loss_of(z) and its gradient with respect to the images alone (B, 3, S, S): no parameter gradient, no reduction."""
        parts = self._split(images, as_leaves=True)
        with torch.enable_grad():
            if len(parts) == 1:
                loss = loss_of(self.backend.attack_embed(parts[0], route, output=output))
                return loss.detach(), torch.autograd.grad(loss, parts[0])[0]
            z, random = self._without_graph(parts, route, output)
            loss = loss_of(z)
            (grad_z,) = torch.autograd.grad(loss, z)
            found = []
            for part, grad, state in zip(parts, grad_z.split(self.micro_size), random, strict=True):
                with _drawing_again(state, part.device):
                    z_part = self.backend.attack_embed(part, route, output=output)
                    found.append(torch.autograd.grad(z_part, part, grad)[0])
        return loss.detach(), torch.cat(found)

    def _without_graph(
        self, parts: tuple[torch.Tensor, ...], route: Route, output: Output
    ) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """The first pass: embeddings as a leaf, and where the random numbers of each part began."""
        rows, random = [], []
        with torch.no_grad(), self.backend.untouched():
            for part in parts:
                random.append(_random_state(part.device))
                rows.append(self.backend.attack_embed(part, route, output=output))
        return torch.cat(rows).requires_grad_(), random

    def _split(self, images: torch.Tensor, *, as_leaves: bool = False) -> tuple[torch.Tensor, ...]:
        parts = images.detach().split(self.micro_size or len(images))
        return tuple(part.detach().requires_grad_() for part in parts) if as_leaves else parts


class TrainingEncoding(Encoding):
    """An encoder that is trained under a parallel backend, m rows at a time."""

    backend: TrainingBackend

    def __init__(self, backend: TrainingBackend, micro_size: int = 0) -> None:
        super().__init__(backend, micro_size)

    def embed(
        self,
        images: torch.Tensor,
        route: Route,
        output: Output = "projections",
        *,
        want_image_gradient: bool = False,
        beside: Embedding | None = None,
    ) -> Embedding:
        """Embeds for training. Every rank must call it with as many rows. All embeddings of a step keep their graphs or none:
        one of fewer rows is embedded as that `beside` it was."""
        parts = self._split(images, as_leaves=want_image_gradient)
        if len(parts) == 1 and (beside is None or len(beside.parts) == 1):
            graph = self.backend.embed(parts[0], route, output)
            return Embedding(graph.detach().requires_grad_(), route, (_Part(parts[0], graph, []),), output)
        z, random = self._without_graph(parts, route, output)
        without = tuple(_Part(part, None, state) for part, state in zip(parts, random, strict=True))
        return Embedding(z, route, without, output)

    def embed_views(self, views: Sequence[tuple[torch.Tensor, Route]]) -> list[Embedding] | None:
        """The same of several views in one forward, each with its own batch statistics; None if they must be apart."""
        if self.micro_size or len(views) < 2 or not self.backend.joins_views():
            return None
        images = torch.cat([one.detach() for one, _ in views])
        routes = tuple((route, len(one)) for one, route in views)
        graphs = self.backend.embed(images, routes).split([rows for _, rows in routes])
        return [
            Embedding(graph.detach().requires_grad_(), route, (_Part(one.detach(), graph, []),))
            for graph, (one, route) in zip(graphs, views, strict=True)
        ]

    def backward(self, *embeddings: Embedding, more_to_come: bool = False) -> None:
        """Takes every `z.grad` through the encoder. Gradients are reduced over ranks in the last backward pass only, and not
        at all yet with `more_to_come`."""
        work: list[tuple[_Part, torch.Tensor, Embedding]] = []
        for embedding in sorted(embeddings, key=lambda one: one.output != "logits"):  # the last pass reduces the projector
            assert embedding.z.grad is not None
            grads = embedding.z.grad.split([len(part.images) for part in embedding.parts])
            work += [(part, grad, embedding) for part, grad in zip(embedding.parts, grads, strict=True)]
        again = [item for item in work if item[0].graph is None]
        whole = [(part.graph * grad).sum() for part, grad, _ in work if part.graph is not None]
        assert not (again and whole), "embeddings with and without a graph"
        if whole:
            with self._holding(hold=more_to_come):
                self.backend.backward(sum(whole[1:], whole[0]))
        for number, (part, grad, of) in enumerate(again):
            with self._holding(hold=more_to_come or number < len(again) - 1), _drawing_again(part.random, part.images.device):
                self.backend.backward((self.backend.embed(part.images, of.route, of.output) * grad).sum())

    def input_gradient_of(self, embedding: Embedding, loss_of: LossOf) -> LossAndGradient:
        """The same from an embedding's graph, which stays whole for `backward`."""
        (part,) = embedding.parts
        assert part.graph is not None
        loss = loss_of(embedding.z)
        (grad_z,) = torch.autograd.grad(loss, embedding.z)
        return loss.detach(), torch.autograd.grad(part.graph, part.images, grad_z, retain_graph=True)[0]

    @contextmanager
    def _holding(self, *, hold: bool) -> Iterator[None]:
        if hold:
            with self.backend.reduction_held():
                yield
        else:
            yield


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """Where the generators of dropout are."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextmanager
def _drawing_again(state: list[torch.Tensor], device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield
