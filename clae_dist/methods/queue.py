"""The momentum encoder and the queue of its last keys, as settings and as state of a method; queries that may be attacked.

# B rows on this rank, N rows on all ranks, K rows of the queue, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from clae_dist.config import Attack, MethodSettings
from clae_dist.config.rules import setting
from clae_dist.errors import ConfigError
from clae_dist.methods.adversarial_term import AdversarialTerm
from clae_dist.methods.labelled import check_no_objective

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Config
    from clae_dist.contrast.interface import Step
    from clae_dist.contrast.method import State, Terms
    from clae_dist.objectives.form import Rows


@dataclass(frozen=True)
class QueueSettings(MethodSettings):
    """The keys `method.*` of methods with a key encoder and a queue."""

    momentum: float = setting(
        0.99, ge=0, lt=1, zero="the encoder itself", help="Decay of the key encoder's average of weights."
    )
    queue: int = setting(4096, ge=0, zero="no queue", help="Number of keys in the queue; a multiple of batch.global_size.")

    @property
    def key_decay(self) -> float:
        return self.momentum

    def check_run(self, config: Config) -> None:
        check_no_objective(config)
        size = config.batch.global_size
        if self.queue % size:
            below = self.queue // size * size
            raise ConfigError(
                f"method.queue is {self.queue}, which batch.global_size {size} does not divide; try {below or size}."
            )
        if config.model.statistics_differ:
            raise ConfigError(
                f"model.{config.model.statistics_differ}, but the key encoder averages running statistics, which would then "
                "differ between ranks; use model.norm=global with model.norm_group=all. "
                "The keys themselves use no batch statistics, so nothing leaks through them."
            )

    def for_few_rows(self, global_size: int) -> Self:
        return replace(super().for_few_rows(global_size), queue=2 * global_size if self.queue else 0)


@dataclass(frozen=True)
class QuerySettings(QueueSettings, AdversarialTerm):
    """The keys `method.*` of methods that match queries with keys, and attack the queries if `alpha` is set."""

    alpha: float = setting(
        0.0, ge=0, zero="no attack", help="Weight of the adversarial term. moco and ascl have 0 unless it is set."
    )

    @property
    def uses_attack(self) -> bool:  # type: ignore[override]
        return self.alpha > 0

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        return 4 + (self.fraction * (3 + attack.random_start + 2 * attack.num_steps) if self.uses_attack else 0)


def match_terms(s: Step, settings: QuerySettings, x: torch.Tensor, match: Callable[[Rows, Any], torch.Tensor]) -> Terms:
    """The loss match(f(x), every image) and, with α, that of x_adv, which raises it within ε of x. Collective.

    Args:
        match: the loss of queries for the images at an index of the batch (see Step.choose).
    """
    every = s.choose(len(x), len(x))
    if not settings.present(s):
        return {"clean": (1.0, match(s.embed(x), every))}
    rows = s.choose(settings.num_attacked(len(x)), len(x))
    start = x[rows]
    # The anchor is not used: as the start it costs no forward.
    x_adv = s.attack(start, lambda _, queries: match(queries, rows), anchor=start, rows=rows)
    a, c = s.embed_views(x, adversarial=[x_adv])
    return {"clean": (1.0, match(a, every)), "adversarial": (settings.alpha, match(c, rows))}


def random_queue(size: int, embedding_dim: int, seed: int) -> torch.Tensor:
    """Unit rows (K, D), a function of the seed, for the start of a run."""
    import torch
    import torch.nn.functional as F

    return F.normalize(torch.randn(size, embedding_dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def enqueue(s: Step, rows: State) -> None:
    """Replace the oldest N entries of each named tensor of the state by those of the step; K is a multiple of N."""
    for name, rows_ND in rows.items():
        queue_KD = s.state[name]
        first = s.step * len(rows_ND) % len(queue_KD)
        queue_KD[first : first + len(rows_ND)] = rows_ND.to(queue_KD.dtype)
