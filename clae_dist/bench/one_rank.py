"""One rank of a simulated world: the data of the other ranks are in memory, and are copied where a network would send them.

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
from clae_dist.config import Objective
from clae_dist.contrast import distributed
from clae_dist.objectives import PerAnchor, find
from clae_dist.objectives.dense import dense_loss
from clae_dist.objectives.form import Rows

Grads = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class OneRank:
    """Rank `rank` of `size` with the rows of all ranks and, for the log-sum-exp form, the shifts of all anchors."""

    objective: str  # of one direction: the mean of both is measured
    temperature: float
    views: tuple[torch.Tensor, torch.Tensor]  # (N, D) each, of unit length
    size: int
    rank: int
    rest: tuple[torch.Tensor, ...] = ()  # log Σ exp s of each row of a view over the columns of other ranks: (N,) each
    shifts: tuple[torch.Tensor, ...] = ()  # contrast/distributed.py's, for each direction: (N, V, S)

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
        return self._rows_of(self.rank)

    def _rows_of(self, rank: int) -> slice:
        count = len(self.views[0]) // self.size
        return slice(rank * count, (rank + 1) * count)

    @property
    def form(self) -> PerAnchor:
        form = find(self.objective)
        assert isinstance(form, PerAnchor)
        return form

    @property
    def settings(self) -> Objective:
        """The settings of the objective; `chunk` is chosen by the device."""
        return Objective(self.objective, self.temperature)

    @property
    def directions(self) -> Sequence[tuple[int, int]]:
        """The views (a, b) of each loss whose mean is measured."""
        return ((0, 1),) if self.form.columns == "both views" else ((0, 1), (1, 0))

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (view[self.mine].clone().requires_grad_() for view in self.views)
        return a, b

    def with_computed_shifts(self) -> OneRank:
        """A copy with `rest` and with the shifts that the other ranks would compute; each takes M² products."""
        return replace(
            self,
            shifts=tuple(self._shifts(*direction) for direction in self.directions),
            rest=tuple(self._rest(view) for view in range(2)),
        )

    def with_typical_shifts(self) -> OneRank:
        """A copy with the shifts of random unit rows, -(log M + 1 / (2 τ² D)), where M² products would take too long."""
        images, dim = self.views[0].shape
        num_views = 2 // len(self.directions)
        typical = -math.log(images * num_views) - 1 / (2 * self.temperature**2 * dim)
        return replace(self, shifts=tuple(self.views[0].new_full((images, num_views, 1), typical) for _ in self.directions))

    def in_float64(self) -> OneRank:
        a, b = (view.double() for view in self.views)
        return replace(
            self, views=(a, b), rest=tuple(t.double() for t in self.rest), shifts=tuple(t.double() for t in self.shifts)
        )

    def _shifts(self, *direction: int) -> torch.Tensor:
        parts: list[torch.Tensor] = []

        def keep(shift: torch.Tensor, group: Any) -> torch.Tensor:
            parts.append(shift)
            return shift

        with replaced(distributed, _shifts_of_all_ranks=keep):
            for rank in range(self.size):
                rows = self._rows_of(rank)
                a, b = (Rows(self.views[v][rows].clone().requires_grad_(), self.views[v]) for v in direction)
                distributed.per_anchor_loss(self.form, a, b, rows.start, self.settings, None)
        return torch.cat(parts)

    def _column_views(self, view: int) -> Sequence[int]:
        return (0, 1) if self.form.columns == "both views" else (1 - view,)

    def _rest(self, view: int) -> torch.Tensor:
        columns, images = torch.cat([self.views[v] for v in self._column_views(view)]), len(self.views[0])
        parts = []
        for rank in range(self.size):
            rows = self._rows_of(rank)
            s = self.views[view][rows] @ columns.T / self.temperature
            for number, column_view in enumerate(self._column_views(view)):
                s[:, self.mine.start + number * images : self.mine.stop + number * images] = -torch.inf
                if column_view == view:
                    s[:, rows.start + number * images : rows.stop + number * images].diagonal().fill_(-torch.inf)
            parts.append(s.logsumexp(1))
        return torch.cat(parts)

    # ---- the gather, without a network ----

    def received(self, view: int, mine: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks in a new tensor, as after an all-gather; differentiable in the rows of this rank."""
        everyone = self.views[view]
        return torch.cat([everyone[: self.mine.start], mine, everyone[self.mine.stop :]])

    def parts(self, mine: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows of each rank; backward stacks their gradients for a reduction, as gathers into lists do."""
        # Find the view that these rows belong to; a peer may have normalised them again.
        distances = [float((mine.detach()[0] - view[self.mine][0]).abs().sum()) for view in self.views]
        view = distances.index(min(distances))
        parts: tuple[torch.Tensor, ...] = _ReceiveParts.apply(mine, self.views[view], self.size, self.rank)
        return parts

    # ---- ours ----

    def by_log_sum_exp(self, a: torch.Tensor, b: torch.Tensor, chunk: int = 0) -> torch.Tensor:
        """The log-sum-exp form; its gradient is that of all ranks' losses."""
        with torch.no_grad():
            rows = [Rows(mine, self.received(view, mine)) for view, mine in enumerate((a, b))]
        others = list(self.shifts)

        def of_all_ranks(shift: torch.Tensor, group: Any) -> torch.Tensor:
            everyone = others.pop(0).clone()
            everyone[self.mine] = shift
            return everyone

        settings = replace(self.settings, chunk=chunk)
        with replaced(distributed, _shifts_of_all_ranks=of_all_ranks):
            losses = [
                distributed.per_anchor_loss(self.form, rows[one], rows[other], self.mine.start, settings, None)
                for one, other in self.directions
            ]
        return torch.stack(losses).mean()

    def by_reduce_scatter(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The dense form, differentiable in all columns; its gradient is that of this rank's loss."""
        rows = [Rows(mine, self.received(view, mine)) for view, mine in enumerate((a, b))]
        losses = [
            dense_loss(self.form, rows[one], rows[other], self.mine.start, self.settings) for one, other in self.directions
        ]
        return torch.stack(losses).mean()

    # ---- the reference ----

    def reference(self) -> tuple[Grads, Grads]:
        """The loss in float64, with its gradients in this rank's rows: of this rank's loss, and of the sum of all ranks'.

        Both are torch's autograd; other ranks' losses depend on this rank's rows through the sums over their anchors.
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
        """Context in which lightly and open_clip gather from this rank's memory and are otherwise unchanged."""
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


class _ReceiveParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor, everyone: torch.Tensor, size: int, rank: int) -> tuple[torch.Tensor, ...]:
        ctx.rank = rank
        return tuple(part.clone() for part in everyone.chunk(size))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return torch.stack(grads)[ctx.rank], None, None, None
