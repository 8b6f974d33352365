"""The global batch norm: equal to one process, for one view and for several in one forward, with one collective for all."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import nn

from clae_dist import collectives
from clae_dist.errors import ConfigError
from clae_dist.models.batch_norm import GlobalBatchNorm, normalise_views
from clae_dist.models.norms import RoutedNorm, add_routes, set_route, use_global_statistics
from clae_dist.world import World
from tests.ranks import RankPool

ROWS = 12  # of the first view, of all ranks
SIZES = (12, 12, 6)  # rows of the views of all ranks: two clean ones, and half of an adversarial one
TIGHT = {"atol": 1e-10, "rtol": 0}  # float64, values around 100


def make_norm(group: dist.ProcessGroup | None, *, affine: bool = True) -> nn.Module:
    norm = nn.BatchNorm2d(5, momentum=0.3, affine=affine).double()
    with torch.no_grad():
        if affine:
            norm.weight.copy_(torch.linspace(-1, 2, 5))
            norm.bias.copy_(torch.linspace(1, -1, 5))
    return norm if group is None else GlobalBatchNorm(norm, group)


def make_rows(number: int, seed: int) -> torch.Tensor:
    x = torch.randn(number, 5, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x + torch.arange(number, dtype=torch.float64).view(-1, 1, 1, 1) + 100  # ranks' means far apart, and far from zero


def gradient_of(y: torch.Tensor) -> torch.Tensor:
    return y.sin() * y.detach().cos()


def on_rank(world: World, flat: bool) -> tuple[torch.Tensor | None, ...]:
    norm = make_norm(world.group).train()
    x = make_rows(ROWS, 0).chunk(world.size)[world.rank].clone()
    if flat:  # as a batch norm within a projector has it
        x, norm.running_mean = x[:, :, 0, 0].clone(), norm.running_mean
    x.requires_grad_()
    y = norm(x) if isinstance(norm, GlobalBatchNorm) or not flat else norm(x[..., None, None]).flatten(1)
    gradient_of(y).sum().backward()
    return (y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var, norm.num_batches_tracked)


@pytest.mark.parametrize(("world_size", "flat"), [(2, False), (3, False), (4, False), (2, True)])
def test_it_equals_one_process(ranks: RankPool, world_size: int, flat: bool) -> None:
    found = ranks.run(world_size, on_rank, flat)
    y, x_grad, weight_grad, bias_grad, mean, variance, count = on_rank(World.single("cpu"), flat)
    torch.testing.assert_close(torch.cat([f[0] for f in found]), y, **TIGHT)
    torch.testing.assert_close(torch.cat([f[1] for f in found]), x_grad, **TIGHT)
    torch.testing.assert_close(sum(f[2] for f in found), weight_grad, **TIGHT)
    torch.testing.assert_close(sum(f[3] for f in found), bias_grad, **TIGHT)
    for f in found:
        torch.testing.assert_close(f[4], mean, **TIGHT)
        torch.testing.assert_close(f[5], variance, **TIGHT)
        assert f[6] == count == 1


def test_it_evaluates_with_running_statistics(ranks: RankPool) -> None:
    for found in ranks.run(2, _evaluated, 0):
        assert found == (True, True)


def _evaluated(world: World, _: int) -> tuple[bool, bool]:
    norm, x = nn.BatchNorm2d(5).double(), make_rows(ROWS, 0)
    norm(x)
    ours = GlobalBatchNorm(copy.deepcopy(norm), world.group).eval()
    expected = norm.eval()(x)
    views = normalise_views(x, [ours, ours], [5, ROWS - 5])
    return bool(torch.allclose(ours(x), expected)), bool(torch.allclose(views, expected))


# ---- several views in one forward ----


def two_routes(group: dist.ProcessGroup | None, affine: bool) -> nn.Sequential:
    module = nn.Sequential(make_norm(None, affine=affine))
    add_routes(module, adversarial_momentum=0.2)
    if affine:
        with torch.no_grad():
            module[0].adversarial.weight.copy_(torch.linspace(2, -1, 5))
    use_global_statistics(module, group)
    return module.train()


def views_of(world: World) -> list[torch.Tensor]:
    return [make_rows(size, seed).chunk(world.size)[world.rank].clone() for seed, size in enumerate(SIZES)]


def joined(world: World, affine: bool, compiled: bool = False, low: bool = False) -> tuple[list[torch.Tensor], dict[str, int]]:
    """Results, gradients and statistics of three views in one forward, and how many collectives that took."""
    module, views = two_routes(world.group, affine), views_of(world)
    calls: dict[str, int] = {"all_gather": 0, "all_reduce": 0}
    gather, reduce = collectives.all_gather, dist.all_reduce
    collectives.all_gather = lambda *given: calls.update(all_gather=calls["all_gather"] + 1) or gather(*given)  # type: ignore
    dist.all_reduce = lambda *given, **more: calls.update(all_reduce=calls["all_reduce"] + 1) or reduce(*given, **more)
    try:
        x = torch.cat(views).requires_grad_()
        if low:
            x = x.detach().bfloat16().requires_grad_()
            module.float()
        set_route(module, tuple(zip(("clean", "clean", "adversarial"), map(len, views), strict=True)))
        run = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        y = run(x)
        gradient_of(y).sum().backward()
    finally:
        collectives.all_gather, dist.all_reduce = gather, reduce
    return [y.detach(), x.grad, *_left_in(module)], calls


def apart(views: Sequence[torch.Tensor], affine: bool) -> list[torch.Tensor]:
    """The same, each view in a forward of torch's batch norm."""
    module, results, grads = two_routes(None, affine), [], []
    for view, route in zip(views, ("clean", "clean", "adversarial"), strict=True):
        x = view.clone().requires_grad_()
        set_route(module, route)
        y = module(x)
        gradient_of(y).sum().backward()
        results.append(y.detach())
        grads.append(x.grad)
    return [*results, *grads, *_left_in(module)]


def _left_in(module: nn.Module) -> list[torch.Tensor]:
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return grads + [buffer for buffer in module.buffers() if buffer.is_floating_point()]


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_views_of_one_forward_have_their_own_statistics_and_one_collective(
    ranks: RankPool, world_size: int, affine: bool, compiled: bool
) -> None:
    found = ranks.run(world_size, joined, affine, compiled)
    expected = apart([make_rows(size, seed) for seed, size in enumerate(SIZES)], affine)
    for (results, calls), rank in zip(found, range(world_size), strict=True):
        assert calls == {"all_gather": 1, "all_reduce": 1}
        sizes = [size // world_size for size in SIZES]
        for number, rows in enumerate((results[0], results[1])):
            for view, part in enumerate(rows.split(sizes)):
                torch.testing.assert_close(part, expected[3 * number + view].chunk(world_size)[rank], **TIGHT)
    num_grads = 4 if affine else 0
    for one, all_of_it in enumerate(expected[6 : 6 + num_grads]):
        torch.testing.assert_close(sum(results[2 + one] for results, _ in found), all_of_it, **TIGHT)
    for one, statistic in enumerate(expected[6 + num_grads :]):
        torch.testing.assert_close(found[-1][0][2 + num_grads + one], statistic, **TIGHT)


def test_in_bfloat16_sums_are_float32(ranks: RankPool) -> None:
    for (y, grad, *rest), _ in ranks.run(2, joined, True, False, True):
        assert y.dtype == grad.dtype == torch.bfloat16
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in rest)


# ---- the ranks that share statistics ----


def _in_group(world: World, which: str) -> str | tuple[torch.Tensor, int]:
    try:
        group = world.norm_group(which)
    except ConfigError as error:
        return str(error)
    module = nn.Sequential(make_norm(None))
    use_global_statistics(module, group)
    return module.train()(make_rows(ROWS, 0).chunk(world.size)[world.rank].clone()).detach(), dist.get_world_size(group)


@pytest.mark.parametrize(("which", "size"), [("all", 4), ("node", 4), ("2", 2), ("1", 1)])
def test_a_group_of_neighbours_shares_statistics(ranks: RankPool, which: str, size: int) -> None:
    found = ranks.run(4, _in_group, which)
    groups = make_rows(ROWS, 0).chunk(4 // size)
    expected = torch.cat([make_norm(None).train()(rows) for rows in groups]).detach()
    torch.testing.assert_close(torch.cat([y for y, _ in found]), expected, **TIGHT)
    assert {ranks_of_group for _, ranks_of_group in found} == {size}


def test_a_group_that_does_not_divide_the_ranks_is_refused_everywhere(ranks: RankPool) -> None:
    for error in ranks.run(4, _in_group, "3"):
        assert error == "model.norm_group is 3, which does not divide the 4 ranks; use node or all."


def test_a_single_process_has_no_group() -> None:
    assert World.single("cpu").norm_group("node") is None
    module = nn.Sequential(nn.BatchNorm2d(5))
    use_global_statistics(module, None)
    assert not isinstance(module[0], (GlobalBatchNorm, RoutedNorm))
