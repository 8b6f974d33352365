"""`clae bench contrast`: forward and backward of one rank's loss, compared with lightly, open_clip and a dense loss.

# K local rows (both views) against M rows of all ranks, D embedding width.

It runs in one process: the data of other ranks are copied from memory (one_rank.py), so only computation is timed. The
log-sum-exps of other ranks, which they would compute at the same time, are computed beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from clae_dist.bench import peers
from clae_dist.bench.measure import Row, Runs, Say, added_bytes, assert_equal, cpu_figure, make_rows, time_in_turns
from clae_dist.bench.one_rank import OneRank
from clae_dist.bench.outcome import Outcome
from clae_dist.bench.peers import Loss
from clae_dist.devices import local_device
from clae_dist.objectives.softmax import chunk_size

# float32 against a float64 reference: sums of up to a million terms, exponents up to 1 / τ.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shapes:
    """(K, M) pairs."""

    beside: Sequence[tuple[int, int]] = ((512, 8_192), (1_024, 32_768))  # peers
    growing: Sequence[tuple[int, int]] = tuple((512, rows) for rows in (8_192, 32_768, 131_072, 524_288, 1_048_576))
    dim: int = 128
    temperature: float = 0.5
    repeats: int = 7


FULL = Shapes()
QUICK = Shapes(beside=((512, 8_192),), growing=((512, 8_192), (512, 32_768)), repeats=3)


def bench(shapes: Shapes, say: Say) -> Outcome:
    """Raises UnequalError when a contender computes something else."""
    device = local_device()
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


def beside(objective: str, local_rows: int, all_rows: int, shapes: Shapes, device: torch.device, say: Say) -> list[Row]:
    """The rows of one shape, each contender checked against the float64 reference first."""
    kind = "NT-Xent" if objective == "nt_xent" else "instance discrimination across views, both directions"
    case = f"{kind}: {local_rows:,} rows against {all_rows:,}, D {shapes.dim}"
    say(f"{case}: the reference in float64")
    place = OneRank.of(objective, local_rows, all_rows, shapes.dim, shapes.temperature, device).with_computed_shifts()
    alone, together = place.reference()
    a, b = place.leaves()
    runs: dict[str, tuple[str, Callable[[], Any]]] = {}
    with peers.quietly(), place.instead_of_a_network():
        for name, note, loss in _contenders(place):
            call = forward_backward(loss, a, b)
            expected = along_sphere(together if name == "log_sum_exp" else alone, a, b)
            worst = assert_equal(case, name, along_sphere(call(), a, b), expected, TOLERANCE)
            say(f"{case}: {name} is equal, {worst:.0e}")
            runs[name] = (note, call)
        return compare(case, runs, device, shapes.repeats, floor(place))


def compare(case: str, runs: Runs, device: torch.device, repeats: int, floor: Callable[[], Any]) -> list[Row]:
    """A row for each contender, whose results were found equal; `floor` is timed in turns with them."""
    times = time_in_turns({**{name: run for name, (_, run) in runs.items()}, "": floor}, device, repeats)
    figures = {
        name: {
            "floor_s": times[""].median_s,
            "added_bytes": added_bytes(run, device),
            "more": cpu_figure(times[name], device),
        }
        for name, (_, run) in runs.items()
    }
    return make_rows(case, {name: note for name, (note, _) in runs.items()}, times, figures)


def _contenders(place: OneRank) -> Iterator[tuple[str, str, Loss]]:
    temperature = place.temperature
    yield "log_sum_exp", "ours, with the gradient of all ranks' losses from one number per row", place.by_log_sum_exp
    yield "reduce_scatter", "ours, on the full similarity matrix, as a reduce-scatter requires", place.by_reduce_scatter
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
    """The loss, and the gradients projected onto the tangent space of the unit sphere.

    A model receives only that part, and lightly returns no other.
    """
    loss, *grads = found
    rows = (view.detach().to(grad.dtype) for view, grad in zip((a, b), grads, strict=True))
    return [loss, *(grad - (grad * view).sum(1, keepdim=True) * view for grad, view in zip(grads, rows, strict=True))]


def floor(place: OneRank) -> Callable[[], None]:
    """Four matrix products in chunks of the similarity matrix: K x M x D each (instance: K x M/2 x D).

    They are the similarities in the forward pass, the same in the backward pass, and the products with either side.
    log_sum_exp does without the fourth.
    """
    a, b = (view[place.mine] for view in place.views)
    rows = torch.cat([a, b])
    columns = torch.cat(place.views) if place.objective == "nt_xent" else place.views[0]
    chunk = min(chunk_size(rows), len(columns))
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
    """log_sum_exp for one number of rows: `more` has the time per pair of rows and the memory per row."""
    case = f"growing: {local_rows:,} rows against {all_rows:,}, D {shapes.dim}"
    say(case)
    place = OneRank.of("nt_xent", local_rows, all_rows, shapes.dim, shapes.temperature, device).with_typical_shifts()
    a, b = place.leaves()
    call = forward_backward(place.by_log_sum_exp, a, b)
    other = forward_backward(lambda a, b: place.by_log_sum_exp(a, b, chunk=1000), a, b)
    assert_equal(case, "log_sum_exp", call(), other(), TOLERANCE)
    note = "ours; the log-sum-exps of other ranks are those of random rows; checked against itself in chunks of 1000"
    (row,) = compare(case, {"log_sum_exp": (note, call)}, device, max(2, shapes.repeats // 2), floor(place))
    more = {"s_per_pair": row.median_s / (local_rows * all_rows)}
    if row.added_bytes is not None:
        more["added_bytes_per_row"] = row.added_bytes / all_rows
    return replace(row, more=row.more | more)
