"""`clae bench contrast`: one rank's loss, forward and backward, beside lightly's, open_clip's and a dense one.

# K local rows (both views) against M rows of all ranks, D embedding width.

No processes: what other ranks would send is copied from memory (one_rank.py), so this is the time of computing alone. Other
ranks' log-sum-exp, which they would compute meanwhile, is computed before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from clae_dist.bench import peers
from clae_dist.bench.measure import Contender, Row, Say, assert_equal, compare
from clae_dist.bench.one_rank import OneRank
from clae_dist.bench.outcome import Outcome
from clae_dist.bench.peers import Loss
from clae_dist.objectives.softmax import chunk_size

# float32 against a float64 reference: sums of up to a million terms, and exponents of up to 1 / τ.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shapes:
    """(K, M) pairs."""

    beside: Sequence[tuple[int, int]] = ((512, 8_192), (1_024, 32_768))  # peers
    growing: Sequence[tuple[int, int]] = tuple((512, rows) for rows in (8_192, 32_768, 131_072, 524_288, 1_048_576))
    dim: int = 128
    temperature: float = 0.5
    repeats: int = 7


QUICK = Shapes(beside=((512, 8_192),), growing=((512, 8_192), (512, 32_768)), repeats=3)


def bench(shapes: Shapes, device: torch.device, say: Say) -> Outcome:
    """Raises UnequalError when a contender computes something else."""
    notes = peers.missing()
    for note in notes:
        say(note)
    rows: list[Row] = []
    for local_rows, all_rows in shapes.beside:
        for objective in ("nt_xent", "instance"):
            rows += beside(objective, local_rows, all_rows, shapes, device, say)
    for local_rows, all_rows in shapes.growing:
        rows.append(growing(local_rows, all_rows, shapes, device, say))
    return Outcome(rows, device, notes)


def beside(
    objective: str, local_rows: int, all_rows: int, shapes: Shapes, device: torch.device, say: Say, contenders: Any = None
) -> list[Row]:
    """The rows of one shape, each contender checked against the float64 reference first."""
    kind = "NT-Xent" if objective == "nt_xent" else "instance discrimination across views, both directions"
    case = f"{kind}: {local_rows:,} rows against {all_rows:,}, D {shapes.dim}"
    say(f"{case}: the reference in float64")
    place = OneRank.of(objective, local_rows, all_rows, shapes.dim, shapes.temperature, device).with_computed_shifts()
    alone, together = place.reference()
    a, b = place.leaves()
    ready = []
    with peers.quietly(), place.instead_of_a_network():
        for name, note, loss in contenders(place) if contenders else _contenders(place):
            call = forward_backward(loss, a, b)
            expected = along_sphere(together if name == "log_sum_exp" else alone, a, b)
            worst = assert_equal(case, name, along_sphere(call(), a, b), expected, TOLERANCE)
            say(f"{case}: {name} is equal, {worst:.0e}")
            ready.append(Contender(name, note, call))
        return compare(case, ready, device, shapes.repeats, floor(place))


def _contenders(place: OneRank) -> Iterator[tuple[str, str, Loss]]:
    temperature = place.temperature
    yield "log_sum_exp", "ours, with the gradient of all ranks' losses from one number per row", place.by_log_sum_exp
    yield (
        "reduce_scatter",
        "the same on the whole matrix, as a reduce-scatter needs it",
        place.by_reduce_scatter,
    )
    if place.objective == "nt_xent":
        if peers.is_installed("lightly"):
            yield "lightly", "NTXentLoss(gather_distributed=True), the same loss", peers.lightly_nt_xent(temperature)
        dense = peers.dense_nt_xent
    else:
        if peers.is_installed("open_clip"):
            made = peers.open_clip_loss(temperature, place.rank, place.size)
            yield "open_clip", "ClipLoss(local_loss, gather_with_grad), the same loss; it has no NT-Xent", made
        dense = peers.dense_instance
    yield "dense", "torch's cross_entropy on all logits, the same loss", dense(place.parts, place.rank, temperature)


def forward_backward(loss: Loss, a: torch.Tensor, b: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that returns the loss and its gradients in a and b."""

    def call() -> tuple[torch.Tensor, ...]:
        value = loss(a, b)
        return (value.detach(), *torch.autograd.grad(value, (a, b)))

    return call


def along_sphere(found: Sequence[torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    """Loss, and the gradients' part along the sphere of unit rows, all that a model sees of them: lightly keeps no other."""
    loss, *grads = found
    rows = (view.detach().to(grad.dtype) for view, grad in zip((a, b), grads, strict=True))
    return [loss, *(grad - (grad * view).sum(1, keepdim=True) * view for grad, view in zip(grads, rows, strict=True))]


def floor(place: OneRank) -> Callable[[], None]:
    """Four matrix products of the similarity matrix, in chunks, and nothing else: K x M x D each (instance: K x M/2 x D).

    Similarities forward, again backward, and their product with either side. log_sum_exp has no use for the fourth.
    """
    a, b = (view[place.mine] for view in place.views)
    rows = torch.cat([a, b])
    columns = torch.cat(place.views) if place.objective == "nt_xent" else place.views[0]
    chunk = min(chunk_size(len(a), rows.device), len(columns))
    buffer, out = rows.new_empty(len(rows), chunk), torch.zeros_like(rows)
    columns_out = torch.zeros_like(columns)

    def products() -> None:
        for part, part_out in zip(columns.split(chunk), columns_out.split(chunk), strict=True):
            s = buffer[:, : len(part)]
            for _ in range(2):
                torch.mm(rows, part.T, out=s)
            out.addmm_(s, part)
            part_out.addmm_(s.T, rows)

    return products


def growing(local_rows: int, all_rows: int, shapes: Shapes, device: torch.device, say: Say) -> Row:
    """log_sum_exp at one of growing numbers of rows: `more` has the time a pair of rows and the memory a row."""
    case = f"growing: {local_rows:,} rows against {all_rows:,}, D {shapes.dim}"
    say(case)
    place = OneRank.of("nt_xent", local_rows, all_rows, shapes.dim, shapes.temperature, device).with_typical_shifts()
    a, b = place.leaves()
    call = forward_backward(place.by_log_sum_exp, a, b)
    other = forward_backward(lambda a, b: place.by_log_sum_exp(a, b, chunk=1000), a, b)
    assert_equal(case, "log_sum_exp", call(), other(), TOLERANCE)
    note = "ours; others' log-sum-exp as that of random rows; equal to itself in chunks of 1000"
    (row,) = compare(case, [Contender("log_sum_exp", note, call)], device, max(2, shapes.repeats // 2), floor(place))
    more = {"s_per_pair": row.median_s / (local_rows * all_rows)}
    if row.added_bytes is not None:
        more["added_bytes_per_row"] = row.added_bytes / all_rows
    return replace(row, more=row.more | more)
