"""Ranks as processes of this machine; one rank runs in this very process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from types import FrameType

import torch
import torch.distributed as dist

from clae_dist.config import Config
from clae_dist.launchers.rank import FAILED, OK, STOPPED, UNEXPECTED, Ending, run_rank

_GRACE_S = 10.0  # how long ranks may live after one of them has failed


def default_workers() -> int:
    """One rank a GPU; one without GPUs."""
    return max(1, torch.cuda.device_count())


def launch(config: Config, origins: dict[str, str], debug: bool) -> Ending:
    """Trains with `launch.workers` ranks here."""
    workers = config.launch.workers or default_workers()
    config.rows_per_rank(workers)
    if workers == 1:
        return run_rank(config, origins, debug, sys.stdout)
    # The parent holds the store on a port that the system chose; ranks only connect to it, as under torchrun.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    results: SimpleQueue[Ending] = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank_main, args=(rank, workers, store.port, os.getpid(), config, origins, debug, results))
        for rank in range(workers)
    ]
    for process in ranks:
        process.start()

    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.pid and process.is_alive():
                os.kill(process.pid, number)

    # The terminal sends Ctrl-C to the ranks itself; SIGTERM comes to this process alone.
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, forward), signal.SIGINT: signal.signal(signal.SIGINT, forward)}
    try:
        return _watch(ranks, results)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: Sequence[BaseProcess], results: SimpleQueue[Ending]) -> Ending:
    """Waits for the ranks. When one fails, the others get a moment to say why, then are ended."""
    alive = {process.sentinel: rank for rank, process in enumerate(ranks)}
    lost: dict[int, int] = {}
    while alive:
        ready = wait(list(alive), timeout=_GRACE_S if lost else None)
        if not ready:
            break
        for sentinel in ready:
            rank = alive.pop(sentinel)  # type: ignore[arg-type]
            code = ranks[rank].exitcode
            if code not in (OK, STOPPED, FAILED):
                lost[rank] = code if code is not None else UNEXPECTED
    if not results.empty():
        return results.get()
    rank, code = next(iter(lost.items()))
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Ending(FAILED, f"rank {rank} of {len(ranks)} {how}. The same command goes on from the newest checkpoint.")


def _rank_main(
    rank: int,
    size: int,
    port: int,
    parent: int,
    config: Config,
    origins: dict[str, str],
    debug: bool,
    results: SimpleQueue[Ending],
) -> None:
    _die_with(parent)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    ending = run_rank(config, origins, debug, sys.stdout if rank == 0 else None)
    if rank == 0:
        results.put(ending)
    sys.exit(ending.code if ending.code in (OK, STOPPED) else FAILED)


def _die_with(parent: int) -> None:
    """No rank outlives the process that started it, whatever ends that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit(UNEXPECTED)
