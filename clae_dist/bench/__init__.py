"""`clae bench`: what loss, gather, step, data and a checkpoint cost on this machine, beside others' and the floor."""

from __future__ import annotations

from dataclasses import replace

import torch

from clae_dist.bench import checkpoint, contrast, gather, step
from clae_dist.bench.measure import Say


def run_bench(name: str, quick: bool, as_json: bool, say: Say, progress: Say, shards: str = "", rate: float = 0.0) -> int:
    """Measures, and says a table or JSON. Returns 0. Raises UnequalError when what is compared does not compute the same."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "contrast":
        outcome = contrast.bench(contrast.QUICK if quick else contrast.Shapes(), device, progress)
    elif name == "step":
        full = step.CUDA if device.type == "cuda" else step.CPU
        outcome = step.bench(step.QUICK if quick else full, device, progress)
    elif name == "checkpoint":
        outcome = checkpoint.bench(checkpoint.QUICK if quick else checkpoint.Settings(), device, progress)
    elif name == "restart":
        from clae_dist.bench import restart  # with psutil, of the extra `bench`

        outcome = restart.bench(restart.QUICK if quick else restart.Settings(), progress)
    elif name == "data":
        from clae_dist.bench import chunk, data  # with psutil, of the extra `bench`

        outcome = data.bench(replace(chunk.QUICK if quick else chunk.Settings(), rate=rate), shards, device, progress)
    else:
        on_main = gather.bench(gather.QUICK if quick else gather.Settings(), progress)
        if on_main is None:  # a rank that torchrun started, other than the first
            return 0
        outcome = on_main
    say(outcome.as_json() if as_json else outcome.as_table())
    return 0
