"""Softmax statistics over all rows, computed in column chunks so that the full similarity matrix is never materialised.

# K rows (V views of the same images, one after the other), C blocks of M columns (views of all images), D embedding width,
# S scales. s(k, l) = z_k · z_l / temperature. Memory O(K · chunk + C · M · D).

Similarities are computed again in the backward pass instead of being stored. A log-sum-exp is subtracted before every exp, so
that exponents are not positive and a temperature of 0.01 does not overflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

_CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}  # fits into a CPU's cache; few launches on a GPU


def chunk_size(rows_KD: torch.Tensor, requested: int = 0) -> int:
    """Columns of a chunk of similarities of these rows: `requested`, or if that is 0, as many as the bytes of a chunk allow."""
    size = rows_KD.element_size() * max(1, len(rows_KD))
    return requested or max(128, _CHUNK_BYTES.get(rows_KD.device.type, 64 << 20) // size)


def at_least_float32(rows: torch.Tensor) -> torch.Tensor:
    """The rows in float32 if they have less precision: a cosine over a small temperature is too coarse in bfloat16."""
    return rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows


def similarities(
    rows_KD: torch.Tensor, blocks: Sequence[torch.Tensor], temperature: float, excluded: int, chunk: int, views: int = 1
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (columns of each block, similarities (K, C, columns) of all rows to them) chunk by chunk, `chunk` columns in all;
    every chunk uses the same buffer. Blocks are as long as each other.

    The pair of image k, in each of the `views` of the rows, and column excluded + k of any block has similarity -inf: no
    softmax counts it.
    """
    images, num_columns, step = len(rows_KD) // views, len(blocks[0]), -(-chunk // len(blocks))
    scaled = rows_KD / temperature
    buffer = scaled.new_empty(len(rows_KD) * len(blocks) * min(step, num_columns))
    for first in range(0, num_columns, step):
        last = min(first + step, num_columns)
        s = buffer[: len(rows_KD) * len(blocks) * (last - first)].view(len(rows_KD), len(blocks), last - first)
        for number, block_MD in enumerate(blocks):
            torch.mm(scaled, block_MD[first:last].T, out=s[:, number])
        low, high = max(first, excluded), min(last, excluded + images)
        if low < high:
            own = s.view(views, images, *s.shape[1:])[:, low - excluded : high - excluded, :, low - first : high - first]
            own.diagonal(dim1=1, dim2=3).fill_(-torch.inf)
        yield slice(first, last), s


def log_sum_exps(
    rows_KD: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    temperature: float,
    scales: Sequence[float],
    excluded: int,
    chunk: int,
    views: int = 1,
) -> torch.Tensor:
    """log sum exp(c s) of each row over the columns of all blocks but column excluded + k of each, for each scale c. (K, S)"""
    totals: list[torch.Tensor | None] = [None] * len(scales)
    spare = rows_KD.new_empty(0)
    for _, s_KCM in similarities(rows_KD, blocks, temperature, excluded, chunk, views):
        s = s_KCM.flatten(1)
        # torch.logsumexp in place. The maximum of a row without negatives is -inf; minus itself it would be NaN.
        largest = s.amax(1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
        s.sub_(largest)
        for index, scale in enumerate(scales):
            if scale == 0:
                continue
            last = index == len(scales) - 1
            spare = spare if last else _like(s, spare)
            exponents = s if last and scale == 1 else torch.mul(s, scale, out=s if last else spare)
            part = exponents.exp_().sum(1).log_().add_(largest[:, 0], alpha=scale)
            before = totals[index]
            totals[index] = part if before is None else torch.logaddexp(before, part)
    number = sum(map(len, blocks)) - len(blocks)
    count = math.log(number) if number else -math.inf  # at scale 0
    return stacked([rows_KD.new_full((len(rows_KD),), count) if total is None else total for total in totals])


def stacked(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """torch.stack along a new last dimension; of a single tensor no copy."""
    return columns[0].unsqueeze(-1) if len(columns) == 1 else torch.stack(list(columns), -1)


def log_sum_exp_and_mean(
    rows_KD: torch.Tensor, columns_MD: torch.Tensor, temperature: float, excluded: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`log_sum_exps` at scale 1 and, in the same pass, the softmax-weighted mean of the columns, 0 without any. (K,), (K, D)"""
    largest = rows_KD.new_full((len(rows_KD), 1), torch.finfo(rows_KD.dtype).min)
    total, mean = torch.zeros_like(largest), torch.zeros_like(rows_KD)
    for columns, s_KCM in similarities(rows_KD, [columns_MD], temperature, excluded, chunk):
        s = s_KCM[:, 0]
        before, largest = largest, torch.maximum(largest, s.amax(1, keepdim=True))
        fade = (before - largest).exp_()
        weights = s.sub_(largest).exp_()
        total.mul_(fade).add_(weights.sum(1, keepdim=True))
        mean.mul_(fade).addmm_(weights, columns_MD[columns])
    return total.log().add_(largest)[:, 0], mean.div_(total.clamp(min=torch.finfo(total.dtype).tiny))


def _like(s: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    return spare if spare.shape == s.shape else torch.empty_like(s)


@dataclass(frozen=True)
class Weights:
    """One part of the weight of a pair (k, l): sign · exp(c s(k, l) + shift), the shift being row k's or column l's."""

    scale: float  # c
    sign: int
    row_shift: torch.Tensor | None = None  # (K,)
    column_shift: torch.Tensor | None = None  # (C, M), if row_shift is None

    def shift(self, columns: slice) -> torch.Tensor:
        """The shift of these columns or of all rows, for broadcasting over (K, C, columns)."""
        if self.row_shift is not None:
            return self.row_shift[:, None, None]
        assert self.column_shift is not None
        return self.column_shift[:, columns]


def pull(
    rows_KD: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    temperature: float,
    excluded: int,
    chunk: int,
    parts: Sequence[Weights],
    out_KD: torch.Tensor,
    views: int = 1,
) -> None:
    """Add to `out_KD` the sum of all columns z_l, weighted by w(k, l), the sum of all parts."""
    total = spare = rows_KD.new_empty(0)
    for columns, s in similarities(rows_KD, blocks, temperature, excluded, chunk, views):
        for index, part in enumerate(parts):
            if index == len(parts) - 1:  # nothing needs the similarities after it
                buffer = s
            elif index == 0:
                buffer = total = _like(s, total)
            else:
                buffer = spare = _like(s, spare)
            torch.add(part.shift(columns), s, alpha=part.scale, out=buffer).exp_()
            if index:
                total.add_(buffer, alpha=part.sign)
            elif part.sign < 0:
                buffer.neg_()
        weights_KCM = total if len(parts) > 1 else s
        for number, block_MD in enumerate(blocks):
            out_KD.addmm_(weights_KCM[:, number], block_MD[columns])
