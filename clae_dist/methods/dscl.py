"""DSCL: decoupled supervised contrastive learning, whose pull towards the own view is the same for large and small classes.

Reference: Xuan & Zhang 2024, Decoupled contrastive learning for long-tailed recognition, and its public code.

# B rows on this rank, N rows on all ranks, K rows of the queue, D embedding width, L patches of an image, S side of a view.
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

    patches: int = setting(
        0,
        ge=0,
        zero="no patch distillation",
        help="Small crops of view x that learn the similarities of their region in the features of x (DSCL has 5).",
    )
    patch_weight: float = setting(1.5, ge=0, used_by="method.patches", help="Weight of the patches' loss.")
    patch_side: float = setting(
        0.5, gt=0, le=1, used_by="method.patches", help="Side of a patch when it is embedded, as a share of the view's."
    )
    patch_scale: tuple[float, float] = setting(
        (0.05, 0.6), gt=0, le=1, used_by="method.patches", help="Range of a patch's area as a share of the view's."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.patch_scale
        self.require(low <= high, "patch_scale", "the first number is the lower one; use low <= high.")

    @property
    def takes_regions(self) -> bool:
        return self.patches > 0

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        return 4 + (1 + 3 * self.patches * self.patch_side**2 if self.patches else 0)

    def check_run(self, config: Config) -> None:
        super().check_run(config)
        if not self.queue:
            raise ConfigError(f"method.queue is 0, but method.name=dscl needs one; try {config.batch.global_size}.")


class Dscl(Method):
    """-[log p(k_i) + β · mean of log p over the other rows of image i's class] / (1 + β), k = g(y), g the average of f.

    p is the softmax of f(x_i) over all other queries of the global batch, its keys, and a queue of keys with their labels.
    With patches: + w · the mean of -Σ_j q_j(r) log q_j(f(c)) over small crops c of x, where r is the region of c in the map
    that the encoder pools for x, and q the softmax over the own key and the written rows of the queue. q(r) is constant.
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
        if not self.settings.patches:
            return {"clean": (1.0, s.match_groups(s.embed(x), keys, labels_N, queue, self.settings.others))}
        boxes_BL4 = patch_boxes(s.uniform(4 * self.settings.patches), self.settings.patch_scale)
        regions_BLD = s.regions(x, boxes_BL4)
        clean = s.match_groups(s.embed(x), keys, labels_N, queue, self.settings.others)
        written_KD = queue[0][queue[1] != UNWRITTEN]
        total = clean.new_zeros(())
        for number, patches in enumerate(patches_of(x, boxes_BL4, self.settings.patch_side)):
            shares_BM = s.shares(regions_BLD[:, number], keys, written_KD)
            total = total + s.match(s.embed(patches), keys, written_KD, with_batch=False, targets=shares_BM)
        return {"clean": (1.0, clean), "patches": (self.settings.patch_weight, total / self.settings.patches)}

    def after_update(self, s: Step) -> None:
        enqueue(s, s.kept)


def patch_boxes(draws: torch.Tensor, scale: tuple[float, float]) -> torch.Tensor:
    """Boxes (B, L, 4) of left, top, right, bottom as shares of the side, from uniform numbers (B, 4 L): the area uniform in
    `scale`, the ratio log-uniform between 3/4 and 4/3, within the view."""
    import torch

    area, ratio, left, top = draws.view(len(draws), -1, 4).unbind(2)
    area = scale[0] + area * (scale[1] - scale[0])
    stretch = (4 / 3) ** (ratio - 0.5)
    width, height = ((area.sqrt() * by).clamp(max=1) for by in (stretch, 1 / stretch))
    left, top = left * (1 - width), top * (1 - height)
    return torch.stack([left, top, left + width, top + height], 2)


def patches_of(x: torch.Tensor, boxes_BL4: torch.Tensor, side: float) -> list[torch.Tensor]:
    """L batches (B, 3, s, s): each box of the images x (B, 3, S, S), resized to s = side · S."""
    from clae_dist.models.regions import aligned

    size = max(1, round(side * x.shape[-1]))
    patches = aligned(x, boxes_BL4, size).view(*boxes_BL4.shape[:2], x.shape[1], size, size)
    return [one.contiguous().to(x.dtype) for one in patches.unbind(1)]
