"""The similarity matrix a few columns at a time: what a softmax over all rows needs of it, and never the whole.

# K rows, M columns, D embedding width. s(k, l) = z_k · z_l / τ. Memory O(K · chunk + M · D).

Similarities are computed anew in the backward pass rather than kept. Exponents are never positive: a log-sum-exp is
subtracted first, so that a temperature of 0.01 is as good as any.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_BUFFER = {"cpu": 1 << 19, "cuda": 1 << 26}  # similarities that exist at a time: what fits a CPU's cache, what fills a GPU


def chunk_size(num_rows: int, device: torch.device, wanted: int = 0) -> int:
    """Columns that exist at a time: as wanted, or by the device."""
    return wanted or max(128, min(8192, _BUFFER.get(device.type, 1 << 24) // max(1, num_rows)))


def similarities(
    rows_KD: torch.Tensor, columns_MD: torch.Tensor, temperature: float, itself: int | None, chunk: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(which columns, s of all rows and these columns), chunk by chunk; the buffer is the same each time.

    `itself`: row k is column itself + k, a pair that no softmax counts (−∞).
    """
    scaled = rows_KD / temperature
    buffer = scaled.new_empty(len(rows_KD) * min(chunk, len(columns_MD)))
    for first in range(0, len(columns_MD), chunk):
        last = min(first + chunk, len(columns_MD))
        s = buffer[: len(rows_KD) * (last - first)].view(len(rows_KD), last - first)
        torch.mm(scaled, columns_MD[first:last].T, out=s)
        if itself is not None:
            low, high = max(first, itself), min(last, itself + len(rows_KD))
            if low < high:
                s[low - itself : high - itself, low - first : high - first].diagonal().fill_(-torch.inf)
        yield slice(first, last), s


def log_sum_exp(
    rows_KD: torch.Tensor,
    columns_MD: torch.Tensor,
    temperature: float,
    itself: int | None,
    chunk: int,
    before_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """log Σ_l exp s(k, l) for every row; `before_K` is that of other columns, to be added. (K,)"""
    total = before_K
    for _, s in similarities(rows_KD, columns_MD, temperature, itself, chunk):
        # torch.logsumexp in place. A row of nothing but itself has a maximum of −∞, which subtracted would be no number.
        largest = s.amax(1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
        part = s.sub_(largest).exp_().sum(1).log_().add_(largest[:, 0])
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None
    return total


def log_sum_exp_and_mean(
    rows_KD: torch.Tensor, columns_MD: torch.Tensor, temperature: float, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """log Σ_l exp s(k, l), and with it, in the same pass, Σ_l exp(s(k, l) − lse_k) z_l. (K,), (K, D)"""
    largest = rows_KD.new_full((len(rows_KD), 1), torch.finfo(rows_KD.dtype).min)
    total, mean = torch.zeros_like(largest), torch.zeros_like(rows_KD)
    for columns, s in similarities(rows_KD, columns_MD, temperature, None, chunk):
        before, largest = largest, torch.maximum(largest, s.amax(1, keepdim=True))
        fade = (before - largest).exp_()
        weights = s.sub_(largest).exp_()
        total.mul_(fade).add_(weights.sum(1, keepdim=True))
        mean.mul_(fade).addmm_(weights, columns_MD[columns])
    return total.log().add_(largest)[:, 0], mean.div_(total)


def pull(
    rows_KD: torch.Tensor,
    columns_MD: torch.Tensor,
    temperature: float,
    itself: int | None,
    chunk: int,
    out_KD: torch.Tensor,
    lse_rows_K: torch.Tensor | None = None,
    lse_columns_M: torch.Tensor | None = None,
    columns_out_MD: torch.Tensor | None = None,
) -> None:
    """Adds Σ_l w(k, l) z_l to `out_KD`, w(k, l) = exp(s − lse_k) + exp(s − lse_l), of what is given of the two.

    With `columns_out_MD`, Σ_k w(k, l) z_k is added to that, too.
    """
    second = rows_KD.new_empty(0)
    for columns, s in similarities(rows_KD, columns_MD, temperature, itself, chunk):
        if lse_rows_K is not None and lse_columns_M is not None:
            if second.shape != s.shape:
                second = torch.empty_like(s)
            by_column = torch.sub(s, lse_columns_M[columns], out=second).exp_()
            weights = s.sub_(lse_rows_K[:, None]).exp_().add_(by_column)
        elif lse_rows_K is not None:
            weights = s.sub_(lse_rows_K[:, None]).exp_()
        else:
            assert lse_columns_M is not None
            weights = s.sub_(lse_columns_M[columns]).exp_()
        out_KD.addmm_(weights, columns_MD[columns])
        if columns_out_MD is not None:
            columns_out_MD[columns].addmm_(weights.T, rows_KD)
