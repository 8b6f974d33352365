"""MoCo: keys by a slowly moving encoder, and a queue of them as negatives; with an adversarial view, CLAE on MoCo.

References: He et al. 2020, Momentum contrast for unsupervised visual representation learning, algorithm 1; Cai et al. 2021,
Exponential moving average normalization; Ho & Vasconcelos 2020, Contrastive learning with adversarial examples.

# B rows on this rank, N rows on all ranks, K rows of the queue, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from clae_dist.config.method import name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, State, Terms
from clae_dist.errors import ConfigError
from clae_dist.methods.queue import QuerySettings, enqueue, match_terms, random_queue

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Config
    from clae_dist.contrast.interface import Step
    from clae_dist.objectives.form import Rows


@dataclass(frozen=True)
class MoCoSettings(QuerySettings):
    """The keys `method.*` of MoCo."""

    title: ClassVar[str] = "MoCo"
    units_without_term: ClassVar[float] = 4
    name: str = name_of("moco")
    include_batch: bool = setting(
        True, help="The keys of the global batch are negatives, too. Without them no image's attack depends on another's."
    )

    def check_run(self, config: Config) -> None:
        super().check_run(config)
        if not self.queue and not self.include_batch:
            raise ConfigError("method.queue is 0 and method.include_batch is false: there would be no negatives; change one.")

    def describe_attack(self) -> str:
        return f", momentum {self.momentum:g}, queue {self.queue}"


class MoCo(Method):
    """ℓ(f(x), k) + α · ℓ(f(x_adv), k), where k = g(y), g is the average of f, and x_adv raises ℓ(f(x'), k) within ε of x.

    ℓ(q, k) is the cross-entropy of q's similarity to its key among the key, the queue and (include_batch) the other keys of
    the global batch. Queue and keys are constants. Only clean keys enter the queue.
    """

    Settings = MoCoSettings
    settings: MoCoSettings

    def state(self, embedding_dim: int, seed: int) -> State:
        settings = self.settings
        return {"queue": random_queue(settings.queue, embedding_dim, seed)} if settings.queue else {}

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        settings = self.settings
        keys, queue_KD = s.embed_constant(y, momentum=True), s.state.get("queue")
        s.kept["queue"] = keys.all

        def match(queries: Rows, index: Any) -> torch.Tensor:
            return s.match(queries, keys, queue_KD, with_batch=settings.include_batch, index=index)

        return match_terms(s, settings, x, match)

    def after_update(self, s: Step) -> None:
        enqueue(s, s.kept)
