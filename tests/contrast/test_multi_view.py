"""Losses on V views: every way of computing them, on every number of ranks, against a double loop in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clae_dist.config import Objective
from clae_dist.contrast.distributed import Contrast
from clae_dist.objectives.form import Rows
from clae_dist.objectives.multi_view import HardNegatives, Pairs, ViewPairs, every_pair
from clae_dist.world import World
from tests.ranks import RankPool

SETTINGS = Objective(temperature=0.2, chunk=5)
N, D = 12, 6
MIXED = ViewPairs(live={(0, 1): 0.3, (1, 0): 0.2, (2, 0): 0.7}, constant={(0, 2): 0.4, (1, 2): 0.1, (2, 1): 0.25})
KINDS = {
    "live": (3, ViewPairs(live=every_pair(3, 1 / 6))),
    "constant": (3, ViewPairs(constant=every_pair(3, 1 / 3))),
    "mixed": (3, MIXED),
    "two anchors": (4, ViewPairs(live={(2, 0): 0.5, (3, 1): 0.25}, constant={(2, 1): 0.3})),
    "four": (4, ViewPairs(live=every_pair(4, 1 / 12))),
    "hard": (3, replace(MIXED, hard=HardNegatives(beta=1.0, tau_plus=0.12))),
    "hard, without weights": (2, ViewPairs(live=every_pair(2, 0.5), hard=HardNegatives(beta=0.0, tau_plus=0.05))),
}


def unit_rows(view: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(view)
    shared = torch.randn(N, D, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return F.normalize(shared + torch.randn(N, D, generator=draw, dtype=torch.float64), dim=1)


def double_loop(loss: ViewPairs, views: list[torch.Tensor]) -> torch.Tensor:
    """The mean over all images, pair by pair and anchor by anchor."""
    tau = SETTINGS.temperature

    def term(u: int, v: int, columns: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for k in range(N):
            positive = [(views[u][k] * columns[w][k]).sum() / tau for w in range(len(views)) if w != u]
            negative = [(views[u][k] * columns[w][c]).sum() / tau for w in range(len(views)) for c in range(N) if c != k]
            if loss.hard is None:
                denominator = sum(s.exp() for s in (*positive, *negative))
            else:
                mean = sum(s.exp() for s in positive) / len(positive)
                weights = [(loss.hard.beta * s).exp() for s in negative]
                n = len(negative)
                reweighted = sum(w * s.exp() for w, s in zip(weights, negative, strict=True)) / (sum(weights) / n)
                rest = (reweighted - loss.hard.tau_plus * n * mean) / (1 - loss.hard.tau_plus)
                least = n * torch.tensor(-1 / tau, dtype=torch.float64).exp()
                denominator = mean + (rest if rest > least else least)
            total = total + denominator.log() - (views[u][k] * columns[v][k]).sum() / tau
        return total / N

    constant = [view.detach() for view in views]
    live = sum(weight * term(*pair, views) for pair, weight in loss.live.items())
    return live + sum(weight * term(*pair, constant) for pair, weight in loss.constant.items())


def on_ranks(world: World, num_views: int, loss: ViewPairs, gather: str) -> tuple[float, list[torch.Tensor]]:
    contrast = Contrast(replace(SETTINGS, gather=gather), world)
    own = slice(world.rank * N // world.size, (world.rank + 1) * N // world.size)
    mine = [unit_rows(view)[own].requires_grad_() for view in range(num_views)]
    value = contrast.of_views(loss, [contrast.rows(z) for z in mine])
    value.backward()
    return value.item(), [z.grad for z in mine]  # type: ignore[misc]


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_ranks_compute_the_loss_and_gradient_of_a_double_loop(ranks: RankPool, kind: str, world_size: int) -> None:
    num_views, loss = KINDS[kind]
    views = [unit_rows(view).requires_grad_() for view in range(num_views)]
    wanted = double_loop(loss, views)
    wanted.backward()
    for gather in ("log_sum_exp", "reduce_scatter"):
        found = ranks.run(world_size, on_ranks, num_views, loss, gather)
        assert sum(value for value, _ in found) / world_size == pytest.approx(wanted.item(), abs=1e-12)
        for view in range(num_views):
            gradient = torch.cat([gradients[view] for _, gradients in found]) / world_size  # the backend averages over ranks
            torch.testing.assert_close(gradient, views[view].grad, rtol=0, atol=1e-12)


def gradients(loss: ViewPairs, num_views: int) -> tuple[float, list[torch.Tensor]]:
    return on_ranks(World.single("cpu"), num_views, loss, "log_sum_exp")


def test_two_views_are_nt_xent() -> None:
    contrast = Contrast(SETTINGS, World.single("cpu"))
    a, b = unit_rows(0).requires_grad_(), unit_rows(1).requires_grad_()
    wanted = contrast(Rows(a, a), Rows(b, b))
    wanted.backward()
    value, (found, _) = gradients(ViewPairs(live=every_pair(2, 0.5)), 2)
    assert value == pytest.approx(wanted.item(), abs=1e-13)
    torch.testing.assert_close(found, a.grad, rtol=0, atol=1e-13)


def test_hard_negatives_of_two_views_are_hcl() -> None:
    settings = replace(SETTINGS, name="hard", beta=0.8, tau_plus=0.1)
    wanted = Contrast(settings, World.single("cpu"))(*(Rows(z, z) for z in (unit_rows(0), unit_rows(1))))
    value, _ = gradients(ViewPairs(live=every_pair(2, 0.5), hard=HardNegatives(0.8, 0.1)), 2)
    assert value == pytest.approx(wanted.item(), abs=1e-13)


def test_a_weight_on_either_side_changes_no_value_and_is_affine_in_the_gradient() -> None:
    """The asymmetry of A-InfoNCE between clean views (0, 1) and an adversarial one (2), with constant columns."""

    def asymmetric(alpha: float) -> tuple[float, list[torch.Tensor]]:
        pairs: Pairs = {(0, 2): alpha, (2, 0): 1 - alpha}
        return gradients(ViewPairs(constant=pairs), 3)

    _, low = asymmetric(0.0)
    _, half = asymmetric(0.5)
    _, high = asymmetric(1.0)
    for view in range(3):
        torch.testing.assert_close(half[view], (low[view] + high[view]) / 2)
    assert high[2].abs().max() == 0  # only the clean side moves
    assert low[0].abs().max() == 0


def test_a_wrong_sign_of_a_scale_is_not_silent() -> None:
    class Wrong(ViewPairs):
        signs = (-1,)

    _, found = gradients(Wrong(live=every_pair(2, 0.5)), 2)
    assert found[0].isnan().any()
