"""`clae bench step`: training steps with attacks of different cost, compared with plain SimCLR on the same encoder.

# B images, both views, one process: forward, attack, backward, optimiser, without loading and augmenting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from clae_dist.bench.measure import Row, Say, added_bytes, cpu_figure, make_rows, time_in_turns
from clae_dist.bench.outcome import Outcome
from clae_dist.bench.steps import Images, Kind, Variant, check, make_images, prepare, variants
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.step import Pretraining, pretrain_step
from clae_dist.devices import local_device
from clae_dist.planner.record import Recorder
from clae_dist.planner.timing import Sample
from clae_dist.planner.work import Work
from clae_dist.training.usage import peak_flops

_NOTES = {
    "plain": "SimCLR without an attack",
    "original": "the paper's code: two attack forwards with a graph, weight gradients discarded",
    "exact": "the algorithm of original: one attack forward, only the gradient of the input",
    "fused": "another algorithm: the attack follows the clean loss's gradient in view y",
    "advcl_pseudo_labels": "the recipe cifar10/advcl with method.pseudo_labels",
    "fused_half": "another algorithm and less work: fused on half of the batch",
}


@dataclass(frozen=True)
class StepBench:
    kinds: Sequence[Kind] = ()  # empty: CPU or CUDA, by the device
    repeats: int = 5
    check_batch: int = 4  # images of the comparison in float64


# In a narrow ViT, activations, which the units do not count, take a larger share of the time.
_NARROW, _WIDE = (
    ("ViT-tiny, 4 blocks", "four_blocks/vit_tiny_patch16_224"),
    ("ViT-S, 4 blocks", "four_blocks/vit_small_patch16_224"),
)
CPU = (
    Kind("ResNet-18", "torchvision/resnet18", 32, 32, every_method=True),
    Kind(*_NARROW, 32, 64),
    Kind(*_WIDE, 32, 32),
)
FULL = StepBench()
QUICK = StepBench((Kind("small residual network", "small_resnet", 32, 16, every_method=True), Kind(*_NARROW, 16, 8)), repeats=3)
_AT_224 = (
    ("ResNet-50", "torchvision/resnet50", 256),
    ("ViT-S/16", "timm/vit_small_patch16_224", 256),
    ("ViT-B/16", "timm/vit_base_patch16_224", 128),
)
CUDA = (
    Kind("ResNet-18", "torchvision/resnet18", 32, 512, "bfloat16", every_method=True),
    Kind(*_NARROW, 32, 512, "bfloat16"),
    *(Kind(name, encoder, 224, batch, "bfloat16", c) for name, encoder, batch in _AT_224 for c in (False, True)),
)


def bench(settings: StepBench, say: Say) -> Outcome:
    """Raises UnequalError when a step does not compute its algorithm."""
    device = local_device()
    rows: list[Row] = []
    for kind in settings.kinds or (CUDA if device.type == "cuda" else CPU):
        say(f"{kind.title()}: equal in float64?")
        check(replace(kind, precision="float64", compile=False, batch=settings.check_batch), device)
        rows += measure(kind, settings.repeats, device, say)
    return Outcome(rows, device)


# ---- time ----


def measure(kind: Kind, repeats: int, device: torch.device, say: Say) -> list[Row]:
    say(f"{kind.title()}: time")
    images, compared = make_images(kind, device), variants(kind)
    prepared = {name: prepare(kind, variant, device) for name, variant in compared.items()}
    steps = {name: one_step(run, images) for name, run in prepared.items()}
    works = {name: work_of(step) for name, step in _eager(kind, compared, steps, images, device)}
    flops = {name: work.flops for name, work in works.items()}
    times = time_in_turns(steps, device, repeats, at_least_s=0.0)
    peaks = {name: added_bytes(step, device) for name, step in steps.items()}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = peak_flops(gpu, kind.precision, tf32=torch.backends.cuda.matmul.allow_tf32)
    plain, shared_norms = times["plain"].median_s, prepared["exact"].shared_norms
    notes, figures = {}, {}
    for name, time in times.items():
        units = compared[name].units(shared_norms=shared_norms)
        counted = f"{units:g} units, plain has 6; the floor is these at the rate of plain" if units else "units not counted"
        notes[name] = f"{_NOTES.get(name, f'the recipe cifar10/{name}')}; {counted}"
        more = {"images_per_s": kind.batch / time.median_s, **cpu_figure(time, device)}
        if device.type == "cpu":
            more["cpu_to_plain"] = min(time.cpu) / min(times["plain"].cpu)
        more |= {"flops": flops[name], "flops_to_plain": flops[name] / flops["plain"]}
        counted_work = Sample.of(works[name].bins, time.median_s)
        more |= {"kernel_bytes": counted_work.other_bytes, "kernels": counted_work.kernels}
        more["flops_per_s"] = flops[name] / time.median_s
        if peak:
            more["mfu_percent"] = 100 * more["flops_per_s"] / peak
        floor = {"floor_s": plain * units / 6} if units else {}
        figures[name] = {"added_bytes": peaks[name], "more": more, **floor}
    return make_rows(kind.title(), notes, times, figures)


def work_of(step: Callable[[], Any]) -> Work:
    """Operations, bytes and kernels of a step, from which `clae plan` predicts others."""
    with Recorder(without_data=False) as recorder:
        step()
    return recorder.finish()


def _eager(
    kind: Kind,
    compared: Mapping[str, Variant],
    steps: Mapping[str, Callable[[], Any]],
    images: Images,
    device: torch.device,
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The steps without compilation, as the products in compiled blocks cannot be counted."""
    for name, variant in compared.items():
        yield name, one_step(prepare(replace(kind, compile=False), variant, device), images) if kind.compile else steps[name]


def one_step(run: Pretraining, images: Images) -> Callable[[], Any]:
    return lambda: pretrain_step(run, images, Moment())
