"""Losses on V views of the images at once: weighted pairs of views, each anchor against the rows of all views.

# B rows on this rank, V views, S scales, n negatives of an anchor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clae_dist.objectives.debiased import corrected

if TYPE_CHECKING:
    import torch

Pairs = Mapping[tuple[int, int], float]  # (u, v) -> weight of the term in which anchors of view u are drawn to view v


@dataclass(frozen=True)
class HardNegatives:
    """An anchor's negatives weighted by their similarity and corrected for those of its own class (Robinson et al. 2021)."""

    beta: float
    tau_plus: float


@dataclass(frozen=True)
class ViewPairs:
    """The sum over pairs (u, v) of weight · ℓ(u → v), where ℓ(u → v) = mean over images k of log Σ_c exp s(a, c) − s(a, p).

    a is the row of image k in view u, p that in view v; c are all rows of all views but a itself, p among them.
    For V = 2 and weights of 1/2 this is NT-Xent; for V views and 1 / (V (V - 1)) it is SupCon with one image a class.

    Args:
        live: pairs whose rows all have gradient.
        constant: pairs in which the rows that an anchor is compared with are constants: only the anchor moves.
        hard: the denominator is then the mean of the exponentiated positives and the corrected, weighted sum of the negatives.
    """

    live: Pairs = field(default_factory=dict)
    constant: Pairs = field(default_factory=dict)
    hard: HardNegatives | None = None

    @property
    def scales(self) -> tuple[float, ...]:
        """Scales c of the log-sum-exps of the negatives, log Σ exp(c s), that `losses` needs."""
        return (1.0,) if self.hard is None else (1 + self.hard.beta, self.hard.beta)

    @property
    def anchors(self) -> list[int]:
        """The views whose rows are anchors."""
        return sorted({anchor for anchor, _ in (*self.live, *self.constant)})

    @property
    def signs(self) -> tuple[int, ...]:
        """For each scale, 1 if the loss does not fall as that log-sum-exp grows, -1 if it does not rise."""
        return (1,) if self.hard is None else (1, -1)

    def losses(
        self, pairs: Pairs, pos_VVB: torch.Tensor, lse_VBS: torch.Tensor, num_negatives: int, temperature: float
    ) -> torch.Tensor:
        """The weighted sum over these pairs, from similarities of views of an image and log-sum-exps of the negatives."""
        total = pos_VVB.new_zeros(())
        for anchor in sorted({u for u, _ in pairs}):
            others = [v for v in range(len(pos_VVB)) if v != anchor]
            positives = pos_VVB[anchor, others]
            full_B = self._denominator(positives, lse_VBS[anchor], num_negatives, temperature)
            total = total + sum(
                weight * (full_B - pos_VVB[anchor, v]).mean() for (u, v), weight in sorted(pairs.items()) if u == anchor
            )
        return total

    def _denominator(
        self, positives: torch.Tensor, lse_BS: torch.Tensor, num_negatives: int, temperature: float
    ) -> torch.Tensor:
        """The log of each anchor's denominator, (B,)."""
        import torch

        if self.hard is None:
            return torch.cat([positives, lse_BS.T]).logsumexp(0)
        mean_B = positives.logsumexp(0) - math.log(len(positives))
        weighted_B = math.log(num_negatives) + lse_BS[:, 0] - lse_BS[:, 1]
        return mean_B.logaddexp(corrected(mean_B, weighted_B, num_negatives, self.hard.tau_plus, temperature))


def every_pair(num_views: int, weight: float) -> Pairs:
    """Each ordered pair of different views with the same weight."""
    return {(u, v): weight for u in range(num_views) for v in range(num_views) if u != v}
