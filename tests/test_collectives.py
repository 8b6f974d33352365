"""The collectives of the package warn of nothing, on the torch that is installed."""

from __future__ import annotations

import warnings

import torch

from clae_dist import collectives
from clae_dist.contrast.distributed import gather_rows
from clae_dist.models.batch_norm import GlobalBatchNorm
from clae_dist.world import World
from tests.ranks import RankPool


def _forward_and_backward(world: World) -> tuple[list[float], list[float], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = torch.full((1, 2), float(world.rank), requires_grad=True)
        everyone = gather_rows(rows, world.group)
        everyone.square().sum().backward()
        assert world.group is not None
        GlobalBatchNorm(torch.nn.BatchNorm2d(2), world.group)(torch.rand(2, 2, 3, 3)).sum().backward()
    assert rows.grad is not None
    return everyone[:, 0].tolist(), rows.grad[0].tolist(), [str(warning.message) for warning in caught]


def test_a_gather_and_its_backward_warn_of_nothing(ranks: RankPool) -> None:
    for rank, (everyone, gradient, warned) in enumerate(ranks.run(2, _forward_and_backward)):
        assert everyone == [0.0, 1.0]
        assert gradient == [4.0 * rank] * 2  # of 2 ranks, each with 2x
        assert warned == []


def test_a_torch_without_the_new_names_keeps_the_old_ones(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    for name in ("all_gather_single", "all_gather_into_tensor"):
        monkeypatch.setattr(torch.distributed, name, name, raising=False)
    assert collectives._named("all_gather_single", "all_gather_into_tensor") == "all_gather_single"
    monkeypatch.delattr(torch.distributed, "all_gather_single")
    assert collectives._named("all_gather_single", "all_gather_into_tensor") == "all_gather_into_tensor"


def _sum_in_pairs(world: World) -> float:
    pair = world.rank // 2 * 2
    number = torch.tensor(float(world.rank))
    torch.distributed.all_reduce(number, group=world.subgroup([pair, pair + 1]))
    return number.item()


def test_a_group_of_fewer_ranks_leaves_the_pool_as_it_was(ranks: RankPool) -> None:
    """torch counts groups into their names: a rank that has seen more of them would wait for ever in the next group."""
    assert ranks.run(2, _sum_in_pairs) == [1, 1]
    assert ranks.run(4, _sum_in_pairs) == [1, 1, 5, 5]
