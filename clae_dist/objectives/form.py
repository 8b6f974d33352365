"""The three forms of an objective, and the decorators that declare them. No ranks, no collectives, no state.

# B rows on this rank, N rows on all ranks, D embedding width, A anchors, S scales. Rows have unit length.
# a, b are the two views. This rank's rows are rows start ... start + B of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

UNWRITTEN = -2  # the group of a row of a queue that holds no key yet; -1 is an image without a group

Columns = Literal["both views", "other view"]
Function = Callable[["torch.Tensor", "torch.Tensor", int, Any], "torch.Tensor"]
PairFunction = Callable[["torch.Tensor", Any], "torch.Tensor"]
Scales = Callable[[Any], Sequence[float]]


class Rows(NamedTuple):
    """One view's embeddings: this rank's, and those of all ranks in the order of ranks."""

    mine: torch.Tensor  # (B, D)
    all: torch.Tensor  # (N, D)

    def constant(self) -> Rows:
        """The same rows without gradient."""
        return Rows(self.mine.detach(), self.all.detach())


@dataclass(frozen=True)
class PerAnchor:
    """An objective that is the mean over anchors of `function(pos_A, lse_AS, num_negatives, settings) -> (A,)`.

    Args:
        function: of the similarity s = cosine / temperature of each anchor's positive, and of log-sum-exps of the
            similarities of its negatives, log sum exp(c s), one for each scale c. The positive is in none of them.
        scales: the scales c as a function of the settings `objective.*`, each 0 or more.
        signs: for each scale, 1 if the function does not fall as that log-sum-exp grows, -1 if it does not rise.
        columns: the negatives of an anchor. "both views": all rows of both views except the anchor and its positive; all
            rows are anchors. "other view": all rows of view b except the positive; the rows of view a are anchors. For 2
            ranks of 2 rows, the positives (1), negatives (0) and excluded columns (-) of rank 1's anchors (start 2):

                       both views                           other view
                       a0 a1 a2 a3 b0 b1 b2 b3              b0 b1 b2 b3
                  a2 [  0  0  -  0  0  0  1  0 ]       a2 [  0  0  1  0 ]
                  a3 [  0  0  0  -  0  0  0  1 ]       a3 [  0  0  0  1 ]
                  b2 [  0  0  1  0  0  0  -  0 ]
                  b3 [  0  0  0  1  0  0  0  - ]

        uses: the settings `objective.*` that the function reads, besides the temperature.
    """

    function: Function
    scales: Scales
    signs: tuple[int, ...]
    columns: Columns
    uses: tuple[str, ...]


@dataclass(frozen=True)
class PerPair:
    """An objective that is the mean over anchors of -log p of the positive + the sum over negatives of `function(log p)`.

    p is the softmax of an anchor's similarities to its positive and its negatives, which are those of PerAnchor's "both views";
    all rows are anchors. The rows that an anchor is compared with are constants: a row has the gradient of its own anchor
    alone, and no gradient returns from other ranks.

    Args:
        function: `function(log_p, settings)`, elementwise and differentiable; value and slope at log p = -inf are 0.
        uses: the settings `objective.*` that the function reads, besides the temperature.
    """

    function: PairFunction
    uses: tuple[str, ...]


@dataclass(frozen=True)
class Dense:
    """An objective of any other form: `function(a, b, start, settings) -> scalar`, the mean over this rank's anchors.

    It is differentiable in `all` of both views; contrast/distributed.py returns those gradients to the ranks of the rows.
    """

    function: Callable[[Rows, Rows, int, Any], torch.Tensor]
    uses: tuple[str, ...]


def objective(
    scales: Sequence[float] | Scales = (1.0,),
    signs: tuple[int, ...] = (1,),
    columns: Columns = "both views",
    uses: tuple[str, ...] = (),
) -> Callable[[Function], PerAnchor]:
    """Declare a function as an objective of the form PerAnchor, whose documentation explains the arguments."""
    scales_of: Scales = scales if callable(scales) else lambda settings: scales
    return lambda function: PerAnchor(function, scales_of, signs, columns, uses)


def pair_objective(uses: tuple[str, ...] = ()) -> Callable[[PairFunction], PerPair]:
    """Declare a function as an objective of the form PerPair, whose documentation explains the arguments."""
    return lambda function: PerPair(function, uses)


def dense_objective(uses: tuple[str, ...] = ()) -> Callable[[Callable[[Rows, Rows, int, Any], torch.Tensor]], Dense]:
    """Declare a function as an objective of the form Dense."""
    return lambda function: Dense(function, uses)
