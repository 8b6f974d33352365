"""Batch norm with the statistics of all ranks, ours and torch's, compared with one process on all rows in float64.

# B rows on this rank, N rows on all ranks, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from clae_dist.models.norms import use_global_statistics
from clae_dist.verify.check import SkippedError, Subject, Verdict
from clae_dist.world import World

_BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4}  # absolute, of numbers of about 1; weight gradients are per row
_ROWS, _CHANNELS, _SIDE = 4, 8, 5


def check(subject: Subject, world: World) -> Verdict:
    """Outputs, gradients and running statistics. Collective."""
    if world.group is None:
        raise SkippedError("one rank; its batch is the global batch")
    problems: list[str] = []
    figures: dict[str, Any] = {}
    for kind, convert in _kinds(world).items():
        for dtype, bound in _BOUNDS.items():
            differences = _differences(convert, dtype, world)
            figures[f"{kind} {str(dtype).removeprefix('torch.')}"] = differences
            problems += [
                f"{kind}, {dtype}: {name} differs by {value:.1e}" for name, value in differences.items() if not value <= bound
            ]
    figure = ", ".join(f"{name} {max(values.values()):.1e}" for name, values in figures.items())
    return Verdict.of(problems, figure, **figures)


def _kinds(world: World) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Conversions of a module with batch norms: ours, and torch's on GPUs, which alone support it."""
    on_gpu = world.device.type == "cuda"

    def ours(module: nn.Module) -> nn.Module:
        use_global_statistics(module, world.group)
        return module

    def torchs(module: nn.Module) -> nn.Module:
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module, world.group)
        return converted

    return {"ours": ours, **({"SyncBatchNorm": torchs} if on_gpu else {})}


def _differences(convert: Callable[[nn.Module], nn.Module], dtype: torch.dtype, world: World) -> dict[str, float]:
    """The largest difference on any rank from a float64 batch norm in one process."""
    rows = _ROWS * world.size
    draw = torch.Generator().manual_seed(0)
    images, weights = torch.randn((2, rows, _CHANNELS, _SIDE, _SIDE), generator=draw, dtype=torch.float64)
    images = 3 * images + torch.arange(_CHANNELS).view(1, -1, 1, 1)  # means that differ by channel
    expected = _pass(nn.Sequential(nn.BatchNorm2d(_CHANNELS)).double(), images, weights)
    own = slice(world.rank * _ROWS, (world.rank + 1) * _ROWS)
    norm = convert(nn.Sequential(nn.BatchNorm2d(_CHANNELS))).to(world.device, dtype)
    result = _pass(norm, images[own].to(world.device, dtype), weights[own].to(world.device, dtype))
    for name in ("weight_grad", "bias_grad"):
        dist.all_reduce(result[name], group=world.group)
    for name in ("output", "input_grad"):
        expected[name] = expected[name][own]
    scales = {"weight_grad": rows, "bias_grad": rows}
    return {
        name: world.largest(float((result[name].cpu().double() - value).abs().max()) / scales.get(name, 1))
        for name, value in expected.items()
    }


def _pass(module: nn.Module, images: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    images = images.clone().requires_grad_()
    output = module(images)
    (output * weights).sum().backward()
    (norm,) = module.children()
    state = norm.state_dict()
    gradients = {name: parameter.grad for name, parameter in norm.named_parameters()}
    assert images.grad is not None
    return {
        "output": output.detach(),
        "input_grad": images.grad,
        "weight_grad": gradients["weight"],
        "bias_grad": gradients["bias"],
        "running_mean": state["running_mean"],
        "running_var": state["running_var"],
    }
