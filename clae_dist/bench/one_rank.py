"""One rank of a world without processes: what the others would send is at hand, and is copied where a network would.

# B rows of a view on this rank, N on all, D embedding width; K = 2B local rows against M = 2N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from clae_dist.bench import peers
from clae_dist.bench.measure import replaced
from clae_dist.contrast import log_sum_exp as own_form
from clae_dist.contrast.chunked import chunk_size, log_sum_exp
from clae_dist.contrast.objectives import OBJECTIVES, Rows

Grads = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class OneRank:
    """Rank `rank` of `size`, with the rows of all ranks and, for the log-sum-exp form, every row's log-sum-exp."""

    objective: str  # "nt_xent", or "instance": across views, the mean of both directions
    temperature: float
    views: tuple[torch.Tensor, torch.Tensor]  # (N, D) each, of unit length
    size: int
    rank: int
    rest: tuple[torch.Tensor, ...] = ()  # log Σ exp s of each row of a view, over all columns but this rank's: (N,) each
    lse: tuple[torch.Tensor, ...] = ()  # over all columns

    @staticmethod
    def of(objective: str, local_rows: int, rows: int, dim: int, temperature: float, device: torch.device) -> OneRank:
        """Random rows of unit length: `local_rows` of `rows`, both views counted, on a rank in the middle."""
        generator = torch.Generator().manual_seed(0)
        images, size = rows // 2, rows // local_rows
        a = F.normalize(torch.randn(images, dim, generator=generator), dim=1)
        b = F.normalize(a + 0.5 * torch.randn(images, dim, generator=generator) / math.sqrt(dim), dim=1)
        return OneRank(objective, temperature, (a.to(device), b.to(device)), size, size // 2)

    @property
    def mine(self) -> slice:
        count = len(self.views[0]) // self.size
        return slice(self.rank * count, (self.rank + 1) * count)

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (view[self.mine].clone().requires_grad_() for view in self.views)
        return a, b

    def with_honest_lse(self) -> OneRank:
        """Every row's log-sum-exp computed: M² products."""
        rest = tuple(self._lse(number, self._others_columns(number)) for number in range(2))
        own = (self._lse(number, self._own_columns(number)) for number in range(2))
        return replace(self, rest=rest, lse=tuple(torch.logaddexp(one, two) for one, two in zip(rest, own, strict=True)))

    def with_likely_lse(self) -> OneRank:
        """That of random rows of unit length, log M + 1 / (2 τ² D): for more rows than M² products could be computed of."""
        images, dim = self.views[0].shape
        columns = images * (2 if self.objective == "nt_xent" else 1)
        likely = math.log(columns) + 1 / (2 * self.temperature**2 * dim)
        return replace(self, lse=tuple(self.views[0].new_full((images,), likely) for _ in range(2)))

    def in_float64(self) -> OneRank:
        a, b = (view.double() for view in self.views)
        return replace(self, views=(a, b), rest=tuple(t.double() for t in self.rest), lse=tuple(t.double() for t in self.lse))

    # ---- columns: (those of which view, from, to, where row 0 is itself) ----

    def _column_views(self, number: int) -> Sequence[int]:
        return (0, 1) if self.objective == "nt_xent" else (1 - number,)

    def _others_columns(self, number: int) -> Iterator[tuple[torch.Tensor, int | None]]:
        for view in self._column_views(number):
            for low, high in ((0, self.mine.start), (self.mine.stop, len(self.views[0]))):
                yield self.views[view][low:high], -low if view == number else None

    def _own_columns(self, number: int) -> Iterator[tuple[torch.Tensor, int | None]]:
        for view in self._column_views(number):
            yield self.views[view][self.mine], -self.mine.start if view == number else None

    def _lse(self, number: int, columns: Iterator[tuple[torch.Tensor, int | None]]) -> torch.Tensor:
        rows, total = self.views[number], None
        chunk = chunk_size(len(rows), rows.device)
        for block, itself in columns:
            if len(block):
                total = log_sum_exp(rows, block, self.temperature, itself, chunk, total)
        assert total is not None
        return total

    # ---- the gather, without a network ----

    def received(self, view: int, mine: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks in memory of their own, as after an all-gather; differentiable in this rank's."""
        rows: torch.Tensor = _Receive.apply(mine, self.views[view], self.mine)
        return rows

    def parts(self, mine: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows of each rank; what comes back for the others is stacked for a reduction, as gathers that are lists do."""
        # Which view these rows are of; a peer may have scaled them to unit length once more.
        distances = [float((mine.detach()[0] - view[self.mine][0]).abs().sum()) for view in self.views]
        view = distances.index(min(distances))
        found: tuple[torch.Tensor, ...] = _ReceiveParts.apply(mine, self.views[view], self.size, self.rank)
        return found

    # ---- ours ----

    def by_log_sum_exp(self, a: torch.Tensor, b: torch.Tensor, chunk: int = 0) -> torch.Tensor:
        """Ours; the gradient is that of all ranks' losses."""
        with torch.no_grad():
            rows = [Rows(mine, self.received(view, mine)) for view, mine in enumerate((a, b))]
        start, together = self.mine.start, [torch.stack(self.lse, 1)] if self.objective == "nt_xent" else list(self.lse)

        def everyones(lse: torch.Tensor, group: Any) -> torch.Tensor:
            found = together.pop(0).clone()
            found[self.mine] = lse
            return found

        form = own_form.LOG_SUM_EXP[self.objective]
        with replaced(own_form, _everyones=everyones):
            loss = form(rows[0], rows[1], start, self.temperature, chunk, None)
            if self.objective == "instance":
                loss = (loss + form(rows[1], rows[0], start, self.temperature, chunk, None)) / 2
        return loss

    def by_reduce_scatter(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Ours, differentiable in all columns; the gradient is that of this rank's loss."""
        form, start = OBJECTIVES[self.objective], self.mine.start
        rows = [Rows(mine, self.received(view, mine)) for view, mine in enumerate((a, b))]
        loss = form(rows[0], rows[1], start, self.temperature)
        if self.objective == "instance":
            loss = (loss + form(rows[1], rows[0], start, self.temperature)) / 2
        return loss

    # ---- the truth ----

    def reference(self) -> tuple[Grads, Grads]:
        """Loss and its gradients in this rank's rows, in float64: of this rank's loss alone, and of all ranks' together.

        By torch's autograd: the other ranks' part through what this rank's rows are in the sums of their anchors.
        """
        exact = self.in_float64()
        a, b = exact.leaves()
        dense = peers.dense_nt_xent if self.objective == "nt_xent" else peers.dense_instance
        loss = dense(exact.parts, self.rank, self.temperature)(a, b)
        alone = torch.autograd.grad(loss, (a, b))
        others = [index for index in range(len(self.views[0])) if not self.mine.start <= index < self.mine.stop]
        total = loss.new_zeros(())
        for number, rest in enumerate(exact.rest):
            columns = torch.cat([(a, b)[view] for view in self._column_views(number)])
            own = torch.logsumexp(exact.views[number][others] @ columns.T / self.temperature, 1)
            total = total + torch.logaddexp(rest[others], own).sum() / (2 * len(a))
        more = torch.autograd.grad(total, (a, b))
        return (loss.detach(), *alone), (loss.detach(), *(one + two for one, two in zip(alone, more, strict=True)))

    @contextmanager
    def instead_of_a_network(self) -> Iterator[None]:
        """Inside, lightly and open_clip gather from this rank's memory; everything else of them is as it is."""
        with ExitStack() as stack:
            if peers.is_installed("lightly"):
                from lightly.utils import dist

                functions = {"gather": self.parts, "rank": lambda: self.rank, "world_size": lambda: self.size}
                stack.enter_context(replaced(dist, **functions))
            if peers.is_installed("open_clip"):
                import open_clip.loss

                def gather_features(a: torch.Tensor, b: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
                    return torch.cat(self.parts(a)), torch.cat(self.parts(b))

                stack.enter_context(replaced(open_clip.loss, gather_features=gather_features))
            yield


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor, everyone: torch.Tensor, place: slice) -> torch.Tensor:
        ctx.place = place
        return everyone.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0][ctx.place].clone(), None, None


class _ReceiveParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor, everyone: torch.Tensor, size: int, rank: int) -> tuple[torch.Tensor, ...]:
        ctx.rank = rank
        return tuple(part.clone() for part in everyone.chunk(size))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return torch.stack(grads)[ctx.rank], None, None, None
