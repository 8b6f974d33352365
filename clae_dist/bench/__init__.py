"""`clae bench`: the cost of loss, gather, step, data and checkpoints on this machine, beside other packages and a floor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clae_dist.bench import checkpoint, contrast, gather, step
from clae_dist.bench.measure import Say
from clae_dist.devices import local_device


def run_bench(name: str, *, quick: bool, as_json: bool, say: Say, progress: Say, **of_data: Any) -> int:
    """Measure and print a table or JSON. Returns 0. Raises UnequalError when contenders compute different results.

    Args:
        of_data: for the bench "data": `shards`, and fields of chunk.DataBench (`rate`, `split`).
    """
    device = local_device()
    if name == "contrast":
        outcome = contrast.bench(contrast.QUICK if quick else contrast.Shapes(), device, progress)
    elif name == "step":
        full = step.CUDA if device.type == "cuda" else step.CPU
        outcome = step.bench(step.QUICK if quick else full, device, progress)
    elif name == "checkpoint":
        outcome = checkpoint.bench(checkpoint.QUICK if quick else checkpoint.CheckpointBench(), device, progress)
    elif name == "restart":
        from clae_dist.bench import restart  # with psutil, of the extra `bench`

        outcome = restart.bench(restart.QUICK if quick else restart.RestartBench(), progress)
    elif name == "start":
        from clae_dist.bench import start  # with psutil, of the extra `bench`

        outcome = start.bench(start.QUICK if quick else start.StartBench(), progress)
    elif name == "data":
        from clae_dist.bench import chunk, data  # with psutil, of the extra `bench`

        shards = of_data.pop("shards", "")
        outcome = data.bench(replace(chunk.QUICK if quick else chunk.DataBench(), **of_data), shards, device, progress)
    else:
        on_main = gather.bench(gather.QUICK if quick else gather.GatherBench(), progress)
        if on_main is None:  # a rank that torchrun started, other than the first
            return 0
        outcome = on_main
    say(outcome.as_json() if as_json else outcome.as_table())
    return 0
