"""Exponential moving average of the weights: for evaluation, and for the keys of methods with a momentum encoder.

Reference: Polyak & Juditsky 1992.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class WeightAverage:
    """average ← decay · average + (1 - decay) · weights, for this rank's shards of the weights and other tensors of the model.

    Tensors that are not among them, such as running statistics, are the model's own. With decay 0 there is no average;
    with decay 1 it keeps the weights that it began with.

    Args:
        apart: tensors that take part in `in_place`, of which `parts` keeps a second version, and not an average.
    """

    def __init__(self, shards: Sequence[torch.Tensor], decay: float, apart: Sequence[torch.Tensor] = ()) -> None:
        self.decay = decay
        self._shards = [shard.detach() for shard in (*shards, *apart)] if decay else []
        self._num_averaged = len(shards)
        self._average = [shard.clone() for shard in self._shards]

    @torch.no_grad()
    def update(self) -> None:
        """After an optimiser step."""
        if self._shards and self.decay < 1:
            count = self._num_averaged
            torch._foreach_lerp_(self._average[:count], self._shards[:count], 1 - self.decay)

    @property
    def parts(self) -> list[torch.Tensor]:
        """The average of each shard; empty without an average."""
        return self._average

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, shard in zip(self._average, self._shards, strict=True):
            held = shard.clone()
            shard.copy_(average)
            average.copy_(held)
