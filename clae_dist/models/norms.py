"""Normalisation layers with two routes (clean / adversarial), and batch norm over the global batch.

# B rows on this rank, W ranks, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Route = Literal["clean", "adversarial"]
ROUTES: tuple[Route, ...] = ("clean", "adversarial")


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalisation with the mean and variance of all ranks' rows; gradients are summed over ranks, as in gather.py."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: Any, eps: float, group: dist.ProcessGroup) -> Any:
        rows = x.movedim(1, -1).reshape(-1, x.shape[1])  # no copy where channels are interleaved
        if x.dtype in (torch.bfloat16, torch.float16):
            rows = rows.float()  # statistics and what is summed over ranks keep float32
        own_mean = rows.mean(0)
        own = torch.stack([own_mean, (rows - own_mean).square_().mean(0)])  # (2, C); six times as fast as var_mean on a CPU
        everyone = own.new_empty((dist.get_world_size(group), *own.shape))
        dist.all_gather_into_tensor(everyone.view(-1, *own.shape[1:]), own, group=group)
        means, variances = everyone.unbind(1)
        mean = means.mean(0)
        # Within ranks plus between ranks: no difference of two large squares.
        variance = variances.mean(0) + (means - mean).square().mean(0)
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, bias, mean, variance = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )  # as if mean and variance were constants; what flows through them comes below
        sums = torch.stack([grad_weight, grad_bias])  # Σ g·x̂ and Σ g over this rank
        dist.all_reduce(sums, group=ctx.group)
        count = x.numel() // x.shape[1] * dist.get_world_size(ctx.group)
        inverse = (variance + ctx.eps).rsqrt()
        scale = inverse if weight is None else weight * inverse
        slope = -scale * sums[0] * inverse / count
        offset = -scale * sums[1] / count - slope * mean
        shape = (1, -1) + (1,) * (x.dim() - 2)
        grad_x.add_(offset.view(shape)).addcmul_(x, slope.view(shape))
        return grad_x, grad_weight if weight is not None else None, grad_bias if bias is not None else None, None, None


class GlobalBatchNorm(nn.Module):
    """`inner` (a batch norm) with the statistics of the global batch while training; its parameters and buffers are used.

    On any device, unlike torch's SyncBatchNorm. Every rank must hold the same number of rows. One all-gather of 2C numbers
    forward, one all-reduce of 2C backward. `inner` stays the child, so that its state keeps its names below `inner`.
    """

    def __init__(self, inner: _BatchNorm, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.inner = inner
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.inner
        if not norm.training or self.group is None:
            return norm(x)
        y, mean, variance = _GlobalBatchNorm.apply(x, norm.weight, norm.bias, norm.eps, self.group)
        if norm.track_running_stats:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert norm.num_batches_tracked is not None
            assert norm.momentum is not None
            with torch.no_grad():
                count = x.numel() // x.shape[1] * dist.get_world_size(self.group)
                norm.num_batches_tracked.add_(1)
                norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
                norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)
        # timm's BatchNormAct2d carries its dropout and activation with it.
        after = [layer for name in ("drop", "act") if isinstance(layer := getattr(norm, name, None), nn.Module)]
        for layer in after:
            y = layer(y)
        return y


class RoutedNorm(nn.Module):
    """Two batch norms in the place of one, each with its own weights and statistics (Xie et al. 2020)."""

    def __init__(self, clean: nn.Module, adversarial: nn.Module) -> None:
        super().__init__()
        self.clean = clean
        self.adversarial = adversarial
        self.route: Route = "clean"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.clean(x) if self.route == "clean" else self.adversarial(x)


def _replace(module: nn.Module, make: Any) -> int:
    """Puts make(child) in the place of every batch norm below `module`; returns how many."""
    replaced = 0
    for name, child in list(module.named_children()):
        if isinstance(child, _BatchNorm):
            setattr(module, name, make(child))
            replaced += 1
        else:
            replaced += _replace(child, make)
    return replaced


def add_routes(module: nn.Module, adversarial_momentum: float) -> int:
    """A clean and an adversarial copy of every batch norm in `module`; both start equal. Returns how many were replaced."""

    def routed(norm: _BatchNorm) -> RoutedNorm:
        adversarial = copy.deepcopy(norm)
        adversarial.momentum = adversarial_momentum
        return RoutedNorm(norm, adversarial)

    return _replace(module, routed)


def use_global_statistics(module: nn.Module, group: dist.ProcessGroup | None) -> int:
    """Batch statistics over all ranks of `group` for every batch norm in `module`. Returns how many there are."""
    return _replace(module, lambda norm: GlobalBatchNorm(norm, group))


def set_route(module: nn.Module, route: Route) -> None:
    """The norm layers that the next forward of `module` uses."""
    assert route in ROUTES, route
    for child in module.modules():
        if isinstance(child, RoutedNorm):
            child.route = route


def route_parameters(module: nn.Module, route: Route) -> list[nn.Parameter]:
    """The parameters that only this route uses."""
    return [p for child in module.modules() if isinstance(child, RoutedNorm) for p in getattr(child, route).parameters()]


@contextmanager
def untouched_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, forwards in training mode use batch statistics and leave every running statistic as it is."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def single_route_state(state: dict[str, torch.Tensor], route: Route = "clean") -> dict[str, torch.Tensor]:
    """The state of a routed (and global) encoder under the names of the plain one: one route's norm layers, unwrapped."""
    plain: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        parts = key.split(".")
        if any(other in parts for other in ROUTES if other != route):
            continue
        plain[".".join(part for part in parts if part not in (route, "inner"))] = value
    return plain
