"""ASCL: adaptive soft contrastive learning, in which keys near an image's own are part of its target.

Reference: Feng & Patras 2022, Adaptive soft contrastive learning, and its public code.

# B rows on this rank, K rows of the queue, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
class AsclSettings(QuerySettings):
    """The keys `method.*` of ASCL."""

    title: ClassVar[str] = "ASCL"
    units_without_term: ClassVar[float] = 4
    weak_second_view: ClassVar[bool] = True
    name: str = name_of("ascl")
    neighbours: int = setting(1, ge=0, zero="MoCo", help="Number of keys of the queue that join an image's own in its target.")
    teacher_temperature: float = setting(
        0.05, gt=0, used_by="method.neighbours", help="Temperature of the similarities of an image's key to the queue."
    )
    form: Literal["soft", "adaptive_hard", "hard"] = setting(
        "soft",
        used_by="method.neighbours",
        help="Weights of the other keys before they are normalised. soft: neighbours · certainty · share of similarity, at "
        "most 1; adaptive_hard: the certainty for the nearest ones; hard: 1 for the nearest ones.",
    )

    def check_run(self, config: Config) -> None:
        super().check_run(config)
        if self.queue < 2:
            raise ConfigError(
                f"method.queue is {self.queue}, but the certainty of ASCL needs two keys; try {config.batch.global_size}."
            )
        if self.neighbours > self.queue:
            raise ConfigError(f"method.neighbours is {self.neighbours}, but method.queue has {self.queue} keys; use fewer.")

    def describe_attack(self) -> str:
        return f", {self.neighbours} neighbours, momentum {self.momentum:g}, queue {self.queue}"


def targets(keys_BD: torch.Tensor, queue_KD: torch.Tensor, written_K: torch.Tensor, settings: AsclSettings) -> torch.Tensor:
    """Shares (B, 1 + K) of an image's own key and of the keys of the queue; rows that are not written yet have none.

    The certainty is 1 - H / log K' of the distribution over the K' written keys, between 0 (all alike) and 1 (one key).
    """
    import torch

    dtype = torch.promote_types(keys_BD.dtype, torch.float32)
    similar_BK = keys_BD.detach().to(dtype) @ queue_KD.to(dtype).T / settings.teacher_temperature
    log_p_BK = similar_BK.masked_fill(~written_K, torch.finfo(dtype).min).log_softmax(1)
    p_BK = log_p_BK.exp() * written_K
    num_written = written_K.sum().clamp(min=2).to(dtype)
    certainty_B1 = (1 + (p_BK * log_p_BK).sum(1, keepdim=True) / num_written.log()).clamp(0, 1) * (written_K.sum() > 1)
    if settings.form == "soft":
        others_BK = (settings.neighbours * certainty_B1 * p_BK).clamp(max=1)
    else:
        nearest_BK = torch.zeros_like(p_BK).scatter_(1, p_BK.topk(settings.neighbours, 1).indices, 1.0) * written_K
        others_BK = nearest_BK * (certainty_B1 if settings.form == "adaptive_hard" else 1)
    y_BM = torch.cat([torch.ones_like(certainty_B1), others_BK], 1)
    return y_BM / y_BM.sum(1, keepdim=True)


class Ascl(Method):
    """-Σ_j y_j log p_j(f(x)) and, with α, the same for x_adv, which raises it within ε of x; y is constant.

    p is the softmax over the image's own key k = g(y) and the queue, y the weakly augmented view, g the average of f. y_j are
    `targets`: the own key and, the more certain they are, its neighbours in the queue.
    """

    Settings = AsclSettings
    settings: AsclSettings

    def state(self, embedding_dim: int, seed: int) -> State:
        import torch

        size = self.settings.queue
        return {"queue": random_queue(size, embedding_dim, seed), "written": torch.zeros(size, dtype=torch.bool)}

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        settings, queue_KD, written_K = self.settings, s.state["queue"], s.state["written"]
        keys = s.embed_constant(y, momentum=True)
        s.kept |= {"queue": keys.all, "written": written_K.new_ones(len(keys.all))}
        y_BM = targets(keys.mine, queue_KD, written_K, settings)

        def match(queries: Rows, index: Any) -> torch.Tensor:
            return s.match(queries, keys, queue_KD, with_batch=False, index=index, targets=y_BM[index])

        return match_terms(s, settings, x, match)

    def after_update(self, s: Step) -> None:
        enqueue(s, s.kept)
