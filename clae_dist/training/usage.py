"""Use of the machine: peak memory, and the share of a GPU's peak rate that training reaches (MFU)."""

from __future__ import annotations

import re
import resource
import sys
from dataclasses import dataclass

import torch
from torch import nn

from clae_dist.config import Config
from clae_dist.models.flops import forward_flops
from clae_dist.models.norms import routes_are_one_function
from clae_dist.parallel.backend import choose_precision
from clae_dist.world import World


@dataclass(frozen=True)
class Peak:
    """Dense rates in 10¹² operations a second; 0: the GPU has no such products."""

    bfloat16: float
    tf32: float
    float32: float


# By a pattern of torch.cuda.get_device_name, the first that matches. Dense rates of NVIDIA's data sheets of each product (those
# with sparsity are halved), boost clock, compared with published tables of them; B200's float32 is a HGX board's by eight.
PEAKS = {
    r"\bB200\b": Peak(2250, 1125, 75),
    r"\bH[12]00 NVL\b": Peak(835, 418, 60),
    r"\bH100 PCIe\b": Peak(756, 378, 51),
    r"\b(H[12]00|GH200)\b": Peak(989, 494, 67),
    r"\bA100\b": Peak(312, 156, 19.5),
    r"\bL40S\b": Peak(362, 183, 91.6),
    r"\bL4\b": Peak(121, 60, 30.3),
    r"\bA10\b": Peak(125, 62.5, 31.2),
    r"\bV100-SXM": Peak(0, 0, 15.7),
    r"\bV100-PCIE": Peak(0, 0, 14),
    r"\bT4\b": Peak(0, 0, 8.1),
}


def peak_flops(device_name: str, precision: str, *, tf32: bool) -> float:
    """Peak operations a second of a GPU for the products of a precision; 0: unknown."""
    peak = next((peak for pattern, peak in PEAKS.items() if re.search(pattern, device_name)), None)
    if peak is None or precision == "float64":
        return 0.0
    rate = peak.bfloat16 if precision == "bfloat16" else (tf32 and peak.tf32) or peak.float32
    return 1e12 * rate


@dataclass(frozen=True)
class Usage:
    """`pass_flops`: operations of an encoder pass (MethodSettings.units); `peak`: those a second of all ranks; 0: unknown."""

    config: Config
    device: torch.device
    shared_norms: bool
    pass_flops: float
    peak: float

    @staticmethod
    def of(config: Config, model: nn.Module, world: World) -> Usage:
        """For `model` before it is wrapped by a backend."""
        assert isinstance(model.encoder, nn.Module)
        precision = choose_precision(config.train.precision, world.device)[0]
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        peak = world.size * peak_flops(name, precision, tf32=config.train.tf32)
        flops = forward_flops(model.encoder, config.data.image_size) if peak else 0.0
        return Usage(config, world.device, routes_are_one_function(model), flops, peak)

    def mfu(self, first_step: int, last_step: int, steps_per_epoch: int, seconds: float) -> float | None:
        """Percent of the peak rate that the encoder passes of these steps took, or None where the GPU or the cost is unknown.

        As in the studies' budgets, passes of attacks and momentum encoders count; projector, loss and recomputed passes do not.
        """
        config = self.config

        def passes(steps: int) -> float | None:
            return config.method.total_units(config.attack, steps, steps_per_epoch, shared_norms=self.shared_norms)

        before, after = passes(first_step), passes(last_step)
        if not self.peak or before is None or after is None or config.views.local_crops:
            return None
        return 100 * (after - before) * config.batch.global_size * self.pass_flops / (seconds * self.peak)

    def peak_memory_gib(self) -> float:
        """This rank's largest memory so far: allocated by torch on its GPU, or of its process on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
