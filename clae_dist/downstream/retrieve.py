"""Retrieval of instances: images that are found to show the same are pulled together, others pushed apart, without labels.

In the manner of InsCLR (Deng et al. 2022): the same loss and the same mining in rounds, with two differences. Thresholds are
quantiles of the run's own similarities instead of constants of one network, and positives are rows of the memory alone: no
neighbours join the batch.

# B rows on this rank, N rows on all ranks, M training images, K images of a pool, D embedding width
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from clae_dist.config import MethodSettings
from clae_dist.config.method import name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, State, Terms
from clae_dist.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Attack
    from clae_dist.config.method import TrainingSet
    from clae_dist.contrast.interface import Step

NOBODY = -1  # in place of the id of an image
_ITSELF = 1 - 1e-6  # similarity from which a positive is the image itself, or a copy
_PAIRS = 20_000  # of random images, for the similarity of strangers
_BLOCK = 256  # images that are mined at once


@dataclass(frozen=True)
class RetrieveSettings(MethodSettings):
    """The keys `method.*` of the task `retrieve`."""

    title: ClassVar[str] = "instance retrieval"
    name: str = name_of("retrieve")
    images: int = setting(0, ge=0, help="Images of the training set. `clae finetune` takes their number from the set.")
    pool: int = setting(50, ge=1, help="Nearest images among which the positives of an image are looked for.")
    positive: float = setting(
        0.5,
        gt=0,
        lt=1,
        help="Quantile of the similarities of the two views of an image: images of the pool at least as similar are positives.",
    )
    negative: float = setting(
        0.95, gt=0, lt=1, help="Quantile of the similarities of random images, below which images of the pool are negatives."
    )
    rounds: int = setting(2, ge=0, zero="none", help="Rounds in which undecided images of the pool become positives.")
    take: int = setting(5, ge=1, used_by="method.rounds", help="Images that become positives in a round.")
    fill_epochs: int = setting(
        1, ge=0, zero="the memory is empty at first", help="Epochs that fill the memory, in which the loss is the objective's."
    )
    stage_epochs: int = setting(5, ge=1, help="Epochs after which pools and positives are looked for again.")
    margin: float = setting(0.4, ge=-1, lt=1, help="Similarity from which a negative is pushed away.")

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        return 6.0

    def check_set(self, of_set: TrainingSet) -> None:
        super().check_set(of_set)
        if self.images != of_set.images:
            raise ConfigError(f"method.images is {self.images}, but {of_set.where} has {of_set.images}; name their number.")
        if self.pool >= of_set.images:
            raise ConfigError(f"method.pool is {self.pool}, but {of_set.where} has {of_set.images} images; use a smaller pool.")

    def from_the_start(self) -> Self:
        return replace(self, fill_epochs=0)

    def for_few_rows(self, global_size: int) -> Self:
        return replace(super().for_few_rows(global_size), images=global_size, pool=min(self.pool, global_size - 1))

    def describe(self, attack: Attack) -> str:
        return (
            f"task: {self.name}; a pool of {self.pool}, {self.rounds} rounds of {self.take}, every {self.stage_epochs} epochs"
        )


class Retrieve(Method):
    """1 - z(x)·z(y), and the mean over both views z of Σ over positives (1 - s) + Σ over negatives with s > m of s.

    s are similarities to a memory with the last embedding of every image, which is constant. While the memory is
    filled, the loss is the objective of z(x) and z(y).
    """

    Settings = RetrieveSettings
    settings: RetrieveSettings

    def state(self, embedding_dim: int, seed: int) -> State:
        import torch

        images = max(1, self.settings.images)
        nobody = torch.full((images, self.settings.pool), NOBODY)
        return {
            "memory": torch.zeros(images, embedding_dim),
            "alike": torch.zeros(images),
            "positives": nobody,
            "undecided": nobody.clone(),
        }

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        a, b = s.embed_views(x, y)
        ids_B = s.ids.to(x.device, non_blocking=True)
        s.kept |= {"ids": s.everyones(ids_B), "a": a.all.detach(), "b": b.all.detach()}
        if s.epoch < self.settings.fill_epochs:
            return {"clean": (1.0, s.contrast(a, b))}
        state, own = s.state, ids_B % len(s.state["memory"])
        positives, undecided = (state[name][own] for name in ("positives", "undecided"))
        memory, margin = state["memory"].to(a.mine), self.settings.margin
        terms = [memory_loss(z.mine, own, memory, positives, undecided, margin) for z in (a, b)]
        pull = 1 - (a.mine * b.mine).sum(1)
        return {"clean": (1.0, (pull + (terms[0] + terms[1]) / 2).mean())}

    def after_update(self, s: Step) -> None:
        import torch.nn.functional as F

        state, ids = s.state, s.kept["ids"] % len(s.state["memory"])
        state["memory"][ids] = F.normalize(s.kept["a"] + s.kept["b"], dim=1).to(state["memory"])
        state["alike"][ids] = (s.kept["a"] * s.kept["b"]).sum(1).to(state["alike"])
        done, settings = s.step + 1, self.settings
        if done % s.steps(settings.stage_epochs) and done != s.steps(settings.fill_epochs):
            return
        memory, alike = (state[name].float().cpu() for name in ("memory", "alike"))
        positives, undecided = s.decided(lambda: mined(memory, alike, settings))
        state["positives"].copy_(positives)
        state["undecided"].copy_(undecided)


def memory_loss(
    z_BD: torch.Tensor,
    own_B: torch.Tensor,
    memory_MD: torch.Tensor,
    positives_BK: torch.Tensor,
    undecided_BK: torch.Tensor,
    margin: float,
) -> torch.Tensor:
    """Losses (B,) of rows against the memory. The image itself, images without an embedding yet, and those that are neither
    positive nor negative count for nothing.

    Args:
        own_B: the rows' own places in the memory.
        positives_BK, undecided_BK: places in the memory; NOBODY in the rest.
    """
    import torch

    similar = z_BD @ memory_MD.T
    nobody = len(memory_MD)  # a column that is dropped
    kind = torch.zeros((len(z_BD), nobody + 1), dtype=torch.int8, device=z_BD.device)  # 0: negative, 1: positive, 2: neither
    for places, value in ((undecided_BK, 2), (positives_BK, 1), (own_B[:, None], 2)):
        kind.scatter_(1, torch.where(places == NOBODY, nobody, places), value)
    kind = kind[:, :nobody].masked_fill(~memory_MD.any(1), 2)
    pulled = (1 - similar) * ((kind == 1) & (similar < _ITSELF))
    pushed = similar * ((kind == 0) & (similar > margin))
    return (pulled + pushed).sum(1)


def mined(memory_MD: torch.Tensor, alike_M: torch.Tensor, settings: RetrieveSettings) -> torch.Tensor:
    """Positives and undecided images of every image, (2, M, K) places in the memory, NOBODY in the rest.

    Images of the pool as similar as two views of one image are positives. In each round, the undecided with the largest mean
    similarity to the positives so far, of which those of strangers count as 0, become positives, too. Images that were never
    embedded are nobody's positives and have none.
    """
    import torch

    known_M = memory_MD.any(1)
    above = float(alike_M[known_M].quantile(settings.positive))
    draw = torch.Generator().manual_seed(0)
    some = known_M.nonzero()[:, 0]
    pairs = some[torch.randint(len(some), (2, _PAIRS), generator=draw)]
    pairs = pairs[:, pairs[0] != pairs[1]]
    below = min(above, float((memory_MD[pairs[0]] * memory_MD[pairs[1]]).sum(1).quantile(settings.negative)))
    count = min(settings.pool, len(memory_MD) - 1)
    found = torch.full((2, len(memory_MD), settings.pool), NOBODY)
    for rows in torch.arange(len(memory_MD)).split(_BLOCK):
        similar = memory_MD[rows] @ memory_MD.T
        similar[:, ~known_M] = -2
        similar[torch.arange(len(rows)), rows] = -2
        near = similar.topk(count, 1)
        positive = near.values >= above
        undecided = (near.values >= below) & ~positive
        both = torch.cat([memory_MD[rows][:, None], memory_MD[near.indices]], 1)  # (b, 1 + K, D), the image itself first
        within = both @ both.transpose(1, 2)
        within = within * (within >= below)
        for _ in range(settings.rounds):
            anchors = torch.cat([torch.ones_like(positive[:, :1]), positive], 1)
            score = (within[:, 1:] * anchors[:, None]).sum(2) / anchors.sum(1, keepdim=True)
            best = score.masked_fill(~undecided, -1).topk(min(settings.take, count), 1)
            chosen = torch.zeros_like(positive).scatter(1, best.indices, best.values > 0) & undecided
            positive, undecided = positive | chosen, undecided & ~chosen
        known = known_M[rows][:, None]
        for number, kind in enumerate((positive, undecided)):
            found[number, rows, :count] = torch.where(kind & known, near.indices, NOBODY)
    return found
