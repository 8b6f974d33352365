"""Batch norm with the statistics of all ranks, ours and torch's, compared with one process on all rows in float64.

# B rows on this rank, N rows on all ranks, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from clae_dist.models.norms import set_route, use_global_statistics
from clae_dist.verify.check import SkippedError, Subject, Verdict
from clae_dist.world import World

_BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4}  # absolute, of numbers of about 1; weight gradients are per row
_CHANNELS, _SIDE = 8, 5
_ONE, _TWO = (4,), (3, 1)  # rows of each view of a forward, on a rank


def check(subject: Subject, world: World) -> Verdict:
    """Outputs, gradients and running statistics. Collective."""
    if world.group is None:
        raise SkippedError("one rank; its batch is the global batch")
    problems: list[str] = []
    figures: dict[str, Any] = {}
    for kind, (convert, views) in _kinds(world).items():
        for dtype, bound in _BOUNDS.items():
            differences = _differences(convert, views, dtype, world)
            figures[f"{kind} {str(dtype).removeprefix('torch.')}"] = differences
            name, worst = max(differences.items(), key=lambda item: item[1])
            if not worst <= bound:
                problems.append(f"{kind}, {dtype}: {name} differs by {worst:.1e}")
    figure = ", ".join(f"{name} {max(values.values()):.1e}" for name, values in figures.items())
    return Verdict.of(problems, figure, **figures)


def _kinds(world: World) -> dict[str, tuple[Callable[[nn.Module], nn.Module], tuple[int, ...]]]:
    """Conversions of a module with batch norms, and the views of a forward; torch's on GPUs, which alone support it."""
    on_gpu = world.device.type == "cuda"

    def ours(module: nn.Module) -> nn.Module:
        use_global_statistics(module, world.group)
        return module

    def torchs(module: nn.Module) -> nn.Module:
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module, world.group)
        return converted

    theirs = {"SyncBatchNorm": (torchs, _ONE)} if on_gpu else {}
    return {"ours": (ours, _ONE), "ours, two views": (ours, _TWO), **theirs}


def _differences(
    convert: Callable[[nn.Module], nn.Module], views: tuple[int, ...], dtype: torch.dtype, world: World
) -> dict[str, float]:
    """The largest difference on any rank from a float64 batch norm in one process, which sees one view after the other."""
    rows = sum(views) * world.size
    draw = torch.Generator().manual_seed(0)
    images, weights = torch.randn((2, rows, _CHANNELS, _SIDE, _SIDE), generator=draw, dtype=torch.float64)
    images = 3 * images + torch.arange(_CHANNELS).view(1, -1, 1, 1)  # means that differ by channel
    everyones = [number * world.size for number in views]
    expected = _pass(nn.Sequential(nn.BatchNorm2d(_CHANNELS)).double(), images, weights, everyones)
    each = torch.arange(rows).split(everyones)
    own = torch.cat([part.chunk(world.size)[world.rank] for part in each])
    norm = convert(nn.Sequential(nn.BatchNorm2d(_CHANNELS))).to(world.device, dtype)
    set_route(norm, tuple(("clean", number) for number in views))
    result = _pass(norm, images[own].to(world.device, dtype), weights[own].to(world.device, dtype), [sum(views)])
    for name in ("weight_grad", "bias_grad"):
        dist.all_reduce(result[name], group=world.group)
    for name in ("output", "input_grad"):
        expected[name] = expected[name][own]
    scales = {"weight_grad": rows, "bias_grad": rows}
    return {
        name: world.largest(float((result[name].cpu().double() - value).abs().max()) / scales.get(name, 1))
        for name, value in expected.items()
    }


def _pass(module: nn.Module, images: torch.Tensor, weights: torch.Tensor, forwards: list[int]) -> dict[str, torch.Tensor]:
    """In channels last, as in training; `forwards` are the rows of each forward."""
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    output = torch.cat([module(part) for part in images.split(forwards)])
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
