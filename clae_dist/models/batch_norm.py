"""Batch norm over the batches of all ranks of a group: one collective forward, one backward, and no host wait.

One forward may normalise several views, each with its own statistics, weights and bias; they share the collective.

# K views with n_1, … n_K rows on this rank, W ranks, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clae_dist import collectives
from clae_dist.errors import ConfigError

# Operators of torch's library, so that the compiler takes each as it is, without a graph break.


@torch.library.custom_op("clae_dist::global_batch_norm", mutates_args=())
def _forward(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    sizes: Sequence[int],
    eps: float,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (Σ n_k, C, …), normalised; mean and variance of each view on all ranks, (K, C). Every rank has the same sizes."""
    ranks = _group(group)
    parts = x.split(list(sizes))
    own_K2C = torch.stack([_moments(part, eps) for part in parts])
    everyone_WK2C = own_K2C.new_empty((dist.get_world_size(ranks), *own_K2C.shape))
    collectives.all_gather(everyone_WK2C.flatten(0, 1), own_K2C, ranks)
    means, variances = everyone_WK2C.unbind(2)
    mean_KC = means.mean(0)
    # Within ranks plus between ranks: no difference of two large squares.
    variance_KC = variances.mean(0) + (means - mean_KC).square_().mean(0)
    per_view = zip(parts, mean_KC, variance_KC, _of_views(weights, parts), _of_views(biases, parts), strict=True)
    rows = [_normalise(*view, eps) for view in per_view]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)), mean_KC, variance_KC


@torch.library.custom_op("clae_dist::global_batch_norm_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    mean_KC: torch.Tensor,
    variance_KC: torch.Tensor,
    sizes: Sequence[int],
    eps: float,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient in x, and those of weights and biases, (K, 2, C), from this rank's rows."""
    ranks, spread = _group(group), list(sizes)
    passes = _CudaBackward if x.is_cuda else _AnyBackward
    views = [
        passes(*view, eps)
        for view in zip(grad.split(spread), x.split(spread), _of_views(weights, spread), mean_KC, variance_KC, strict=True)
    ]
    sums_K2C = torch.stack([view.sums for view in views])
    own = torch.stack([view.of_parameters for view in views])
    with collectives.waiting():
        dist.all_reduce(sums_K2C, group=ranks)
    size = dist.get_world_size(ranks)
    grads = [view.finish(sums, size) for view, sums in zip(views, sums_K2C, strict=True)]
    return (grads[0] if len(grads) == 1 else torch.cat(grads)), own


@_forward.register_fake
def _(x: Any, weights: Any, biases: Any, sizes: Any, eps: Any, group: Any) -> Any:
    mean = x.new_empty((len(sizes), x.shape[1]), dtype=_type_of_sums(x))
    return torch.empty_like(x), mean, torch.empty_like(mean)


@_backward.register_fake
def _(grad: Any, x: Any, weights: Any, mean: Any, variance: Any, sizes: Any, eps: Any, group: Any) -> Any:
    return torch.empty_like(x), mean.new_empty((len(sizes), 2, x.shape[1]))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, biases, ctx.sizes, ctx.eps, ctx.group = inputs
    ctx.affine = len(weights), len(biases)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *output[1:], *weights)


def _differentiate(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
    x, mean, variance, *weights = ctx.saved_tensors
    grad_x, own = torch.ops.clae_dist.global_batch_norm_backward(
        grad, x, weights, mean, variance, ctx.sizes, ctx.eps, ctx.group
    )
    of_weights, of_biases = own.unbind(1)
    num_weights, num_biases = ctx.affine
    return grad_x, list(of_weights[:num_weights]), list(of_biases[:num_biases]), None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


# ---- one view on one rank ----


def _moments(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Mean and variance of this rank's rows, (2, C)."""
    if x.is_cuda:
        mean, inverse = torch.batch_norm_stats(x, eps)
        return torch.stack([mean, inverse.square().reciprocal_().sub_(eps)])
    rows = x.movedim(1, -1).reshape(-1, x.shape[1]).to(_type_of_sums(x))  # no copy if x is channels last
    mean = rows.mean(0)
    return torch.stack([mean, (rows - mean).square_().mean(0)])  # six times as fast as var_mean on a CPU


def _normalise(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, weight: Any, bias: Any, eps: float) -> torch.Tensor:
    if x.is_cuda:
        return torch.batch_norm_elemt(x, weight, bias, mean, (variance + eps).rsqrt_(), eps)
    return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)


class _CudaBackward:
    """By the kernels of torch's SyncBatchNorm."""

    def __init__(self, grad: Any, x: Any, weight: Any, mean: Any, variance: Any, eps: float) -> None:
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        grad = grad.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        self._view = grad, x, mean, (variance + eps).rsqrt_(), weight
        of_grad, of_product, of_weight, of_bias = torch.batch_norm_backward_reduce(*self._view, True, True, True)
        self.sums = torch.stack([of_grad, of_product])
        self.of_parameters = self.sums if weight is None else torch.stack([of_weight, of_bias])

    def finish(self, sums: torch.Tensor, size: int) -> torch.Tensor:
        _, x, *_ = self._view
        counts = torch.full((size,), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)  # the kernel adds them up
        return torch.batch_norm_backward_elemt(*self._view, sums[0], sums[1], counts)


class _AnyBackward:
    """As if mean and variance were constants; `finish` adds what flows back through them."""

    def __init__(self, grad: Any, x: Any, weight: Any, mean: Any, variance: Any, eps: float) -> None:
        self._grad, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, eps, [True, True, True]
        )
        self.of_parameters = torch.stack([of_weight, of_bias])  # Σ g·x̂ and Σ g over this rank's rows
        self.sums = self.of_parameters.clone()
        self._x, self._mean, self._inverse = x, mean, (variance + eps).rsqrt()
        self._scale = self._inverse if weight is None else weight * self._inverse

    def finish(self, sums: torch.Tensor, size: int) -> torch.Tensor:
        count = self._x.numel() // self._x.shape[1] * size
        slope = -self._scale * sums[0] * self._inverse / count
        offset = -self._scale * sums[1] / count - slope * self._mean
        shape = (1, -1) + (1,) * (self._x.dim() - 2)
        grad: torch.Tensor = self._grad.add_(offset.view(shape)).addcmul_(self._x, slope.view(shape))
        return grad


def _of_views(values: Sequence[torch.Tensor], views: Sequence[Any]) -> Sequence[torch.Tensor | None]:
    return values or [None] * len(views)


def _type_of_sums(x: torch.Tensor) -> torch.dtype:
    """Statistics and sums over ranks are float32 at least."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


# ---- the layer ----


class GlobalBatchNorm(_BatchNorm):
    """Batch norm with the statistics of the batches of all ranks of `group`, which have the same number of rows.

    One all-gather of 2C numbers a view forward, one all-reduce of 2C a view backward. It replaces `norm` and keeps its
    parameters, buffers and names. Collective in training.
    """

    def __init__(self, norm: _BatchNorm, group: dist.ProcessGroup) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.group, self.num_ranks = group.group_name, group.size()
        self.route: object = ""  # within a RoutedNorm, which chooses; otherwise the views of a forward, as there
        # timm's BatchNormAct2d carries its dropout and activation with it.
        self.after = [layer for name in ("drop", "act") if isinstance(layer := getattr(norm, name, None), nn.Module)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [rows for _, rows in self.route] if isinstance(self.route, tuple) else [len(x)]
        return normalise_views(x, [self] * len(sizes), sizes)

    def count(self, mean: torch.Tensor, variance: torch.Tensor, rows: int) -> None:
        """Update the running statistics with those of `rows` values a channel on all ranks."""
        if not self.track_running_stats:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        running = [self.running_mean, self.running_var]
        unbiased = variance * (rows / (rows - 1))
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            torch._foreach_lerp_(running, [new.to(self.running_mean.dtype) for new in (mean, unbiased)], self.momentum)


def normalise_views(x: torch.Tensor, norms: Sequence[GlobalBatchNorm], sizes: Sequence[int]) -> torch.Tensor:
    """Normalise K views, which are `sizes` rows of x (Σ sizes, C, …) each, by their own norm: one collective for all of them.

    In evaluation mode by running statistics. A norm may have several views, whose statistics it counts in their order.
    """
    first = norms[0]
    if not first.training:
        views = zip(x.split(list(sizes)), norms, strict=True)
        rows = [F.batch_norm(part, n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps) for part, n in views]
        y = rows[0] if len(rows) == 1 else torch.cat(rows)
    else:
        weights = [norm.weight for norm in norms if norm.weight is not None]
        biases = [norm.bias for norm in norms if norm.bias is not None]
        if x[0, 0].numel() * min(sizes) * first.num_ranks == 1:
            raise ConfigError(
                "a batch norm has one row of a single value a channel: give ranks more rows (batch.global_size), or let more "
                "ranks share statistics (model.norm_group)."
            )
        if x.is_cuda and not (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        y, mean_KC, variance_KC = torch.ops.clae_dist.global_batch_norm(x, weights, biases, sizes, first.eps, first.group)
        for norm, mean, variance, size in zip(norms, mean_KC, variance_KC, sizes, strict=True):
            norm.count(mean, variance, x[0, 0].numel() * size * norm.num_ranks)
    for layer in first.after:
        y = layer(y)
    return y
