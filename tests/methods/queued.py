"""A method with a state: a queue of the last keys, whose rows are the negatives.

# B rows on this rank, N rows on all ranks, K rows of the queue, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from clae_dist.config import MethodSettings
from clae_dist.config.rules import setting
from clae_dist.contrast.interface import Step
from clae_dist.contrast.method import Method, State, Terms
from clae_dist.objectives.form import Rows


@dataclass(frozen=True)
class QueuedSettings(MethodSettings):
    """The keys `method.*`."""

    title: ClassVar[str] = "Queued"
    uses_attack: ClassVar[bool] = True

    size: int = setting(12, ge=1, help="Rows of the queue.")


class Queued(Method):
    """Cross-entropy of the other view's key among it and the queue, for x and for an adversarial x."""

    Settings = QueuedSettings
    settings: QueuedSettings

    def state(self, embedding_dim: int, seed: int) -> State:
        rows_KD = torch.randn(self.settings.size, embedding_dim, generator=torch.Generator().manual_seed(seed))
        return {"queue": F.normalize(rows_KD, dim=1)}

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        keys = s.embed_constant(y)
        s.kept["keys"] = keys.all

        def loss(anchors: Rows, queries: Rows) -> torch.Tensor:
            positive_B = (queries.mine * keys.mine).sum(1)
            similar = torch.cat([positive_B[:, None], queries.mine @ s.state["queue"].T], 1) / 0.2
            return (similar.logsumexp(1) - similar[:, 0]).mean()

        x_adv = s.attack(x, loss, anchor=x)
        a, c = s.embed(x), s.embed(x_adv, "adversarial")
        return {"clean": (1.0, loss(a, a)), "adversarial": (0.5, loss(c, c))}

    def after_update(self, s: Step) -> None:
        queue_KD, keys_ND = s.state["queue"], s.kept["keys"]
        rows = (s.step * len(keys_ND) + torch.arange(len(keys_ND), device=queue_KD.device)) % len(queue_KD)
        queue_KD[rows] = keys_ND.to(queue_KD.dtype)
