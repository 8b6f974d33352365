"""Contrastive objectives: my rows, all rows, where mine start. No ranks, no collectives, no state.

# B  rows on this rank, N rows on all ranks, D embedding width. Rows are unit length: their products are cosines.
# a, b  the two views. Mine are rows start … start + B of all.

An objective returns the mean over *its own* anchors against all N rows. With a gather whose backward sums over ranks, and
a backend that averages parameter gradients over ranks, that is the gradient of the global batch's mean loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from clae_dist.contrast.chunked import chunk_size, log_sum_exp, pull


class Rows(NamedTuple):
    """One view's embeddings: this rank's, and those of all ranks in the order of ranks."""

    mine: torch.Tensor  # (B, D)
    all: torch.Tensor  # (N, D)

    def constant(self) -> Rows:
        """The same without gradient."""
        return Rows(self.mine.detach(), self.all.detach())


class Objective(Protocol):
    def __call__(self, a: Rows, b: Rows, start: int, temperature: float, chunk: int = 0) -> torch.Tensor:
        """A scalar, at least float32. `chunk`: columns of the similarity matrix that exist at a time, 0 chooses."""


def nt_xent(a: Rows, b: Rows, start: int, temperature: float, chunk: int = 0) -> torch.Tensor:
    """NT-Xent (Chen et al. 2020, equation 1), the mean over the 2B anchors of this rank.

    Every row of both views is an anchor; its positive is the other view of its image, its negatives all other rows. For
    2 ranks of 2 rows, the positives of rank 1's anchors (start = 2) among the columns [all a | all b]:

                 a0 a1 a2 a3 b0 b1 b2 b3
            a2 [  0  0  -  0  0  0  1  0 ]     -  the anchor itself, left out
            a3 [  0  0  0  -  0  0  0  1 ]
            b2 [  0  0  1  0  0  0  -  0 ]
            b3 [  0  0  0  1  0  0  0  - ]
    """
    of_a = softmax_loss(a.mine, (a.all, b.all), (start, None), positive=(1, start), temperature=temperature, chunk=chunk)
    of_b = softmax_loss(b.mine, (a.all, b.all), (None, start), positive=(0, start), temperature=temperature, chunk=chunk)
    return (of_a + of_b) / 2


def instance(a: Rows, b: Rows, start: int, temperature: float, chunk: int = 0) -> torch.Tensor:
    """Instance discrimination across views ("Plain" in Ho & Vasconcelos 2020): anchors a, columns b, one direction.

    For 2 ranks of 2 rows, the positives of rank 1's anchors (start = 2):

                 b0 b1 b2 b3
            a2 [  0  0  1  0 ]
            a3 [  0  0  0  1 ]
    """
    return softmax_loss(a.mine, (b.all,), (None,), positive=(0, start), temperature=temperature, chunk=chunk)


OBJECTIVES: dict[str, Objective] = {"nt_xent": nt_xent, "instance": instance}


def softmax_loss(
    anchors_BD: torch.Tensor,
    columns: tuple[torch.Tensor, ...],
    itself: tuple[int | None, ...],
    positive: tuple[int, int],
    temperature: float,
    chunk: int = 0,
) -> torch.Tensor:
    """Mean over anchors of log Σ_l exp s(k, l) − s(k, pos k), the columns in blocks of (N, D); differentiable in all of them.

    `itself`: in each block, the column that anchor 0 is itself, or None. `positive`: the block, and in it the column that is
    anchor 0's positive. Anchor k's are k columns on. Memory O(B · chunk + N · D).
    """
    return _SoftmaxLoss.apply(anchors_BD, itself, positive, temperature, chunk, *columns)


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: torch.Tensor, *settings_and_columns: Any) -> torch.Tensor:
        itself, positive, temperature, chunk, *columns = settings_and_columns
        rows, blocks = at_least_float32(anchors), [at_least_float32(block) for block in columns]
        chunk = chunk_size(len(rows), rows.device, chunk)
        lse = None
        for block, own in zip(blocks, itself, strict=True):
            lse = log_sum_exp(rows, block, temperature, own, chunk, lse)
        assert lse is not None
        number, first = positive
        positives = (rows * blocks[number][first : first + len(rows)]).sum(1) / temperature
        ctx.save_for_backward(anchors, lse, *columns)
        ctx.settings = itself, positive, temperature, chunk
        return (lse - positives).mean()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        anchors, lse, *columns = ctx.saved_tensors
        itself, (number, first), temperature, chunk = ctx.settings
        rows, blocks = at_least_float32(anchors), [at_least_float32(block) for block in columns]
        wanted = ctx.needs_input_grad[5:]
        rows_out = torch.zeros_like(rows)
        outs = [torch.zeros_like(block) if want else None for block, want in zip(blocks, wanted, strict=True)]
        for block, own, out in zip(blocks, itself, outs, strict=True):
            pull(rows, block, temperature, own, chunk, rows_out, lse_rows_K=lse, columns_out_MD=out)
        mine = slice(first, first + len(rows))
        rows_out -= blocks[number][mine]
        positive_out = outs[number]
        if positive_out is not None:
            positive_out[mine] -= rows
        scale = grads[0] / (temperature * len(rows))
        finished = [out if out is None else out.mul_(scale).to(columns[0].dtype) for out in outs]
        return rows_out.mul_(scale).to(anchors.dtype), None, None, None, None, *finished


def at_least_float32(rows: torch.Tensor) -> torch.Tensor:
    """A cosine over a small temperature is too coarse in bfloat16."""
    return rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
