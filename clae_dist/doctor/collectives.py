"""Check that two processes on this machine can communicate."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

from clae_dist.devices import Request
from clae_dist.doctor.finding import Finding
from clae_dist.launchers.local import spawn
from clae_dist.launchers.rank import Ending

TIMEOUT_S = 60.0
_NUM_CALLS = 20


def check(timeout_s: float = TIMEOUT_S) -> Iterator[Finding]:
    """Sum different numbers over two ranks of this machine, started as the local launcher starts them."""
    import torch

    use_gpus = torch.cuda.device_count() >= 2  # two ranks cannot share one GPU in NCCL
    what = f"{'nccl' if use_gpus else 'gloo'} on 2 ranks"
    ending = spawn(2, sum_over_ranks, "auto" if use_gpus else "cpu", timeout_s)
    if ending.code:
        advice = (
            "several ranks cannot work together here, one can. Is a firewall or a network interface in the way? "
            "NCCL_DEBUG=INFO or TORCH_DISTRIBUTED_DEBUG=DETAIL print more."
        )
        yield Finding("problem", "collectives", f"{what}: {ending.message}", advice)
        return
    sums, seconds = json.loads(ending.message)
    if sums == [[3.0, 30.0]] * 2:
        yield Finding("ok", "collectives", f"{what}: sums are right, {seconds * 1e3:.2f} ms a round trip")
    else:
        advice = "the results of several ranks would be wrong."
        yield Finding("problem", "collectives", f"{what}: the sums are {sums}, expected [3, 30]", advice)


def sum_over_ranks(device: Request, timeout_s: float) -> Ending:
    """The work of each rank: the sums on all ranks and the seconds of one all-reduce, as the JSON message of the ending."""
    import torch

    from clae_dist.errors import OK, UNEXPECTED
    from clae_dist.world import connect

    try:
        with connect(timeout_s, device) as world:
            values = torch.tensor([1.0, 10.0], device=world.device) * (world.rank + 1)
            sums = world.gather_objects((world.mean(values) * world.size).tolist())
            start = time.perf_counter()
            for _ in range(_NUM_CALLS):
                world.mean(values).cpu()
            return Ending(OK, json.dumps([sums, (time.perf_counter() - start) / _NUM_CALLS]))
    except Exception as error:  # of the network: torch has no common type for these
        return Ending(UNEXPECTED, f"a rank failed ({type(error).__name__}: {str(error).strip().splitlines()[0]})")
