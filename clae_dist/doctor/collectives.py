"""Check that two processes on this machine can communicate."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from clae_dist.doctor.finding import Finding

TIMEOUT_S = 120.0


def check(timeout_s: float = TIMEOUT_S) -> Iterator[Finding]:
    """Two processes on this machine sum different numbers over the loopback interface, through the World that training uses."""
    import torch

    what = f"{'nccl' if torch.cuda.device_count() >= 2 else 'gloo'} on 2 ranks"
    try:
        sums, seconds = _all_reduce_in_two_processes(timeout_s, torch.cuda.device_count())
    except subprocess.TimeoutExpired:
        advice = "a firewall or a network interface in the way? NCCL_DEBUG=INFO or TORCH_DISTRIBUTED_DEBUG=DETAIL tell more."
        yield Finding("problem", "collectives", f"{what}: no answer in {timeout_s:.0f} s", advice)
        return
    except RuntimeError as error:
        yield Finding("problem", "collectives", f"{what}: {error}", "several ranks cannot work together here; one still can.")
        return
    if sums != [[3.0, 30.0]] * 2:
        yield Finding(
            "problem", "collectives", f"{what}: summed to {sums}, not [3, 30]", "results of several ranks would be wrong."
        )
    else:
        yield Finding("ok", "collectives", f"{what}: sums are right, {seconds * 1e3:.2f} ms a round trip")


def _all_reduce_in_two_processes(timeout_s: float, num_gpus: int) -> tuple[list[list[float]], float]:
    with socket.socket() as sock:  # a port that is free now
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ends_with_this = f"from clae_dist.lifetime import end_with_parent; end_with_parent({os.getpid()})"
    work = "from clae_dist.doctor import collectives; collectives.one_rank()"
    code = f"import sys; sys.path[:0] = {sys.path!r}; {ends_with_this}; {work}"
    shared: dict[str, str] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if num_gpus < 2:  # two ranks cannot share one GPU in NCCL
        shared["CUDA_VISIBLE_DEVICES"] = ""
    if "lo" in (name for _, name in socket.if_nameindex()):
        shared.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(2):
            place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
            environment = {**os.environ, **shared, **{key: str(value) for key, value in place.items()}}
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes))
        _wait(processes, timeout_s)
    finally:
        for process in processes:
            process.kill()
        outputs = [process.communicate() for process in processes]
    for rank, (process, (_, errors)) in enumerate(zip(processes, outputs, strict=True)):
        if process.returncode > 0:
            last = (errors.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"rank {rank} failed ({last})")
    answers = [json.loads(out.strip().splitlines()[-1]) for out, _ in outputs]
    return [answer["sum"] for answer in answers], max(answer["round_trip_s"] for answer in answers)


def _wait(processes: list[subprocess.Popen[str]], timeout_s: float) -> None:
    """Returns when all have ended or one has failed, for which the other would wait. Raises TimeoutExpired."""
    deadline = time.monotonic() + timeout_s
    while None in (codes := [process.poll() for process in processes]) and not any(codes):
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired("two ranks", timeout_s)
        time.sleep(0.05)


def one_rank() -> None:
    """Body of each of the two processes: print the sum and the time of a small all-reduce."""
    import torch

    from clae_dist.world import World, connect

    with connect(timeout_s=60.0) as world:

        def total(world: World) -> list[float]:
            values = torch.tensor([1.0, 10.0], device=world.device) * (world.rank + 1)
            return [float(value) for value in world.mean(values) * world.size]

        result = total(world)
        start = time.perf_counter()
        for _ in range(20):
            total(world)
        print(json.dumps({"sum": result, "round_trip_s": (time.perf_counter() - start) / 20}))
