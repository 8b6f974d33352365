"""Normalisation layers with several routes (clean, adversarial, …), and batch norm over the global batch.

# B rows on this rank, W ranks, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clae_dist import collectives
from clae_dist.config.method import Route

ROUTES: tuple[Route, ...] = get_args(Route)


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalisation with the mean and variance of all ranks' rows; gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: Any, eps: float, group: dist.ProcessGroup) -> Any:
        rows = x.movedim(1, -1).reshape(-1, x.shape[1])  # no copy if x is channels last
        if x.dtype in (torch.bfloat16, torch.float16):
            rows = rows.float()  # statistics and sums over ranks are float32
        own_mean = rows.mean(0)
        own = torch.stack([own_mean, (rows - own_mean).square_().mean(0)])  # (2, C); six times as fast as var_mean on a CPU
        everyone = own.new_empty((dist.get_world_size(group), *own.shape))
        collectives.all_gather(everyone.view(-1, *own.shape[1:]), own, group)
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
        )  # as if mean and variance were constants; their own gradients are added below
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


class GlobalBatchNorm(_BatchNorm):
    """Batch norm with the statistics of the global batch on CPUs, which torch's SyncBatchNorm does not support.

    Every rank must have the same number of rows. One all-gather of 2C numbers forward, one all-reduce of 2C backward. It
    replaces `norm` and keeps its parameters, buffers and names. Collective.
    """

    def __init__(self, norm: _BatchNorm, group: dist.ProcessGroup) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.group = group
        # timm's BatchNormAct2d carries its dropout and activation with it.
        self.after = [layer for name in ("drop", "act") if isinstance(layer := getattr(norm, name, None), nn.Module)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._normalise(x)
        for layer in self.after:
            y = layer(y)
        return y

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        y, mean, variance = _GlobalBatchNorm.apply(x, self.weight, self.bias, self.eps, self.group)
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            with torch.no_grad():
                count = x.numel() // x.shape[1] * dist.get_world_size(self.group)
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        return y


class RoutedNorm(nn.Module):
    """A batch norm for each route, with its own weights and statistics. Reference: Xie et al. 2020."""

    def __init__(self, norms: Mapping[Route, nn.Module]) -> None:
        super().__init__()
        for route, norm in norms.items():
            self.add_module(route, norm)
        self.route: Route = "clean"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = getattr(self, self.route)(x)
        return y


def _replace(module: nn.Module, make: Any) -> int:
    """Replace every batch norm below `module` by make(child). Returns their number."""
    replaced = 0
    for name, child in list(module.named_children()):
        if isinstance(child, _BatchNorm):
            setattr(module, name, make(child))
            replaced += 1
        else:
            replaced += _replace(child, make)
    return replaced


def add_routes(module: nn.Module, adversarial_momentum: float, routes: Sequence[Route] = ROUTES[:2]) -> int:
    """Replace every batch norm in `module` by one for each route, which start equal; the first is the clean one.

    Args:
        adversarial_momentum: of the running statistics of the other routes.

    Returns: the number of batch norms that were replaced.
    """

    def routed(norm: _BatchNorm) -> RoutedNorm:
        others = {route: copy.deepcopy(norm) for route in routes[1:]}
        for other in others.values():
            other.momentum = adversarial_momentum
        return RoutedNorm({routes[0]: norm, **others})

    return _replace(module, routed)


def use_global_statistics(module: nn.Module, group: dist.ProcessGroup | None, *, on_gpu: bool) -> None:
    """Make every batch norm in `module` use statistics over all ranks of `group`, by torch's SyncBatchNorm or ours."""
    if group is None:
        return  # one rank's batch is the global batch
    if on_gpu:
        from timm.layers import convert_sync_batchnorm  # torch's conversion, and of timm's norms with an activation

        convert_sync_batchnorm(module, group)
    else:
        _replace(module, lambda norm: GlobalBatchNorm(norm, group))


def set_route(module: nn.Module, route: Route) -> None:
    """Select the norm layers that the next forward of `module` uses."""
    assert route in ROUTES, route
    for child in module.modules():
        if isinstance(child, RoutedNorm):
            child.route = route


def has_route(module: nn.Module, route: Route) -> bool:
    """True if `module` has norm layers of this route: every module has a clean one."""
    return route == "clean" or any(isinstance(child, RoutedNorm) and hasattr(child, route) for child in module.modules())


def route_parameters(module: nn.Module, route: Route) -> list[nn.Parameter]:
    """Parameters that only this route uses."""
    routed = [child for child in module.modules() if isinstance(child, RoutedNorm) and hasattr(child, route)]
    return [parameter for child in routed for parameter in getattr(child, route).parameters()]


@contextmanager
def untouched_statistics(module: nn.Module) -> Iterator[None]:
    """Context in which forwards in training mode use batch statistics and do not change running statistics."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    # Without running statistics, torch 2.15's SyncBatchNorm counts rows in float32; its kernel refuses that for bfloat16.
    on_copies = [norm for norm in norms if isinstance(norm, nn.SyncBatchNorm)]
    untracked = [norm for norm in norms if not isinstance(norm, nn.SyncBatchNorm)]
    for norm in untracked:
        norm.track_running_stats = False
    try:
        with statistics_on_copies(on_copies):
            yield
    finally:
        for norm in untracked:
            norm.track_running_stats = True


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Context in which `module` is in evaluation mode."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def statistics_on_copies(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Context in which forwards change copies of the running statistics of these layers, not the originals."""
    own = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: value.clone() for name, value in norm._buffers.items() if value is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            norm._buffers.update(buffers)


def single_route_state(state: dict[str, torch.Tensor], route: Route = "clean") -> dict[str, torch.Tensor]:
    """The state of one route of an encoder, under the names of the encoder without routes."""
    plain: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        parts = key.split(".")
        if any(other in parts for other in ROUTES if other != route):
            continue
        plain[".".join(part for part in parts if part != route)] = value
    return plain


def load_every_route(encoder: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load weights with the names of the encoder without routes, in every route alike; tensors that `weights` lacks stay.

    Raises RuntimeError for a tensor of another shape.
    """
    routed = [name + "." for name, module in encoder.named_modules() if isinstance(module, RoutedNorm)]

    def plain(key: str) -> str:
        prefix = next((name for name in routed if key.startswith(name)), None)
        return key if prefix is None else prefix + key.removeprefix(prefix).partition(".")[2]

    state = {key: weights[plain(key)] for key in encoder.state_dict() if plain(key) in weights}
    encoder.load_state_dict(state, strict=False)


def statistics(module: nn.Module) -> list[torch.Tensor]:
    """Running means and variances."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]


def has_batch_statistics(module: nn.Module) -> bool:
    """True if an image's embedding depends on the other images of its batch."""
    return any(isinstance(child, _BatchNorm) for child in module.modules())


def random_layers(module: nn.Module) -> list[str]:
    """Names of the layers that draw random numbers while training: dropout, stochastic depth."""
    rates = ("p", "drop_prob", "drop_rate", "dropout")
    return [
        name
        for name, child in module.named_modules()
        if any(isinstance(rate := getattr(child, key, 0.0), float) and rate > 0 for key in rates)
    ]


def routes_are_one_function(module: nn.Module) -> bool:
    """True if both routes compute the same function: no batch statistics, and nothing random."""
    return not has_batch_statistics(module) and not random_layers(module)
