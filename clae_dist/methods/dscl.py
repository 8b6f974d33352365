"""DSCL: decoupled supervised contrastive learning, whose pull towards the own view is the same for large and small classes.

Reference: Xuan & Zhang 2024, Decoupled contrastive learning for long-tailed recognition, without its patch distillation.

# N rows on all ranks, K rows of the queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from clae_dist.config.method import name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, State, Terms
from clae_dist.errors import ConfigError
from clae_dist.methods.queue import QueueSettings, enqueue, random_queue
from clae_dist.objectives.form import UNWRITTEN

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Attack, Config
    from clae_dist.contrast.interface import Step


@dataclass(frozen=True)
class DsclSettings(QueueSettings):
    """The keys `method.*` of DSCL."""

    title: ClassVar[str] = "DSCL"
    needs_labels: ClassVar[bool] = True
    name: str = name_of("dscl")
    others: float = setting(
        8.0, ge=0, zero="the own key alone", help="Weight of all others of an image's class together; that of its own key is 1."
    )

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        return 4

    def check_run(self, config: Config) -> None:
        super().check_run(config)
        if not self.queue:
            raise ConfigError(f"method.queue is 0, but method.name=dscl needs one; try {config.batch.global_size}.")


class Dscl(Method):
    """-[log p(k_i) + β · mean of log p over the other rows of image i's class] / (1 + β), k = g(y), g the average of f.

    p is the softmax of f(x_i) over all other queries of the global batch, its keys, and a queue of keys with their labels.
    """

    Settings = DsclSettings
    settings: DsclSettings

    def state(self, embedding_dim: int, seed: int) -> State:
        import torch

        size = self.settings.queue
        return {"queue": random_queue(size, embedding_dim, seed), "labels": torch.full((size,), UNWRITTEN)}

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        keys, labels_N = s.embed_constant(y, momentum=True), s.everyones(s.labels)
        s.kept |= {"queue": keys.all, "labels": labels_N}
        queue = s.state["queue"], s.state["labels"]
        return {"clean": (1.0, s.match_groups(s.embed(x), keys, labels_N, queue, self.settings.others))}

    def after_update(self, s: Step) -> None:
        enqueue(s, s.kept)
