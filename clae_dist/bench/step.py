"""`clae bench step`: whole training steps by what their attack costs, beside plain SimCLR on the same encoder.

# B images, both views, one process: forward, attack, backward, optimiser, without loading and augmenting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from clae_dist.bench.measure import (
    Row,
    Say,
    added_bytes,
    cpu_figure,
    time_in_turns,
    with_ratios,
)
from clae_dist.bench.outcome import Outcome
from clae_dist.bench.steps import Kind, check, prepare, variants, views
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.step import Pretraining, pretrain_step

# Units: the forward of one view is 1, its backward 2; plain SimCLR is 6.
_UNITS = {"plain": 6.0, "original": 15.0, "exact": 11.0, "fused": 9.0, "fused_half": 7.5}
_UNITS_SHARED = _UNITS | {"exact": 10.0}  # both routes are one function: the clean forward of x serves the attack
_NOTES = {
    "plain": "SimCLR without an attack",
    "original": "the paper's code: two attack forwards with a graph, weight gradients thrown away",
    "exact": "the same algorithm as original: one attack forward, the gradient of the input alone",
    "fused": "another algorithm: the attack is the clean loss's gradient in view y",
    "fused_half": "another algorithm and less work: fused on half of the batch",
}


@dataclass(frozen=True)
class StepBench:
    kinds: Sequence[Kind]
    repeats: int = 7
    check_batch: int = 4  # images of the comparison in float64


# The narrower a ViT, the more weigh its activations, which the units do not count.
_NARROW, _WIDE = (
    ("ViT-tiny, 4 blocks", "four_blocks/vit_tiny_patch16_224"),
    ("ViT-S, 4 blocks", "four_blocks/vit_small_patch16_224"),
)
CPU = StepBench((Kind("ResNet-18", "torchvision/resnet18", 32, 32), Kind(*_NARROW, 32, 64), Kind(*_WIDE, 32, 32)), repeats=5)
QUICK = StepBench((Kind("small residual network", "small_resnet", 32, 16), Kind(*_NARROW, 16, 8)), repeats=3)
_AT_224 = (("ResNet-50", "torchvision/resnet50", 256), ("ViT-S/16", "timm/vit_small_patch16_224", 256))
CUDA = StepBench(
    (
        Kind("ResNet-18", "torchvision/resnet18", 32, 512, "bfloat16"),
        Kind(*_NARROW, 32, 512, "bfloat16"),
        *(Kind(name, encoder, 224, batch, "bfloat16", c) for name, encoder, batch in _AT_224 for c in (False, True)),
    )
)


def bench(settings: StepBench, device: torch.device, say: Say) -> Outcome:
    """Raises UnequalError when a step computes something else than what it is said to."""
    rows: list[Row] = []
    for kind in settings.kinds:
        say(f"{kind.title()}: equal in float64?")
        check(replace(kind, precision="float64", compile=False, batch=settings.check_batch), device)
        rows += measure(kind, settings.repeats, device, say)
    return Outcome(rows, device)


# ---- time ----


def measure(kind: Kind, repeats: int, device: torch.device, say: Say) -> list[Row]:
    say(f"{kind.title()}: time")
    images = views(kind, device)
    prepared = {name: prepare(kind, method, device) for name, method in variants().items()}
    steps = {name: one_step(run, images) for name, run in prepared.items()}
    flops = {name: _flops(step) for name, step in _eager(kind, steps, images, device)}
    times = time_in_turns(steps, device, repeats, at_least_s=0.0)
    peaks = {name: added_bytes(step, device) for name, step in steps.items()}
    plain, units = times["plain"].median_s, _UNITS_SHARED if prepared["exact"].shared_norms else _UNITS
    rows = []
    for name, time in times.items():
        note = f"{_NOTES[name]}; {units[name]:g} units of plain's 6, at plain's rate the floor"
        more = {"images_per_s": kind.batch / time.median_s, **cpu_figure(time, device)}
        if device.type == "cpu":
            more["cpu_to_plain"] = min(time.cpu) / min(times["plain"].cpu)
        more |= {"flops": flops[name], "flops_to_plain": flops[name] / flops["plain"]}
        more["flops_per_s"] = flops[name] / time.median_s
        floor = plain * units[name] / units["plain"]
        rows.append(Row(kind.title(), f"{name}: {note}", time.median_s, time.spread, {}, floor, peaks[name], more=more))
    return with_ratios(rows)


def _eager(
    kind: Kind, steps: Mapping[str, Callable[[], Any]], images: tuple[torch.Tensor, torch.Tensor], device: torch.device
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The same steps not compiled: in compiled blocks products cannot be counted."""
    for name, method in variants().items():
        yield name, one_step(prepare(replace(kind, compile=False), method, device), images) if kind.compile else steps[name]


def _flops(step: Callable[[], Any]) -> float:
    """Of products and convolutions in one step, as torch counts them."""
    with _CountFlops() as counter:
        step()
    return counter.total


class _CountFlops(TorchDispatchMode):
    """torch's FlopCounterMode without its hooks by module, which autograd.grad refuses."""

    total = 0.0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        formula = flop_registry.get(operation._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=found)
        return found


def one_step(run: Pretraining, images: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], Any]:
    return lambda: pretrain_step(run, images, Moment())
