"""Ranks as processes of this machine; one rank runs in this very process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from clae_dist.config import Config
from clae_dist.launchers.rank import FAILED, OK, STOPPED, UNEXPECTED, Ending, RankBroke, run_rank
from clae_dist.world import leave

_GRACE_S = 10.0  # how long ranks may live after one of them has failed


@dataclass(frozen=True)
class _Rank:
    process: SpawnProcess
    ending: Connection  # what run_rank returned comes through it


def default_workers() -> int:
    """One rank a GPU; one without GPUs."""
    return max(1, torch.cuda.device_count())


def launch(config: Config, origins: dict[str, str], debug: bool) -> Ending:
    """Trains with `launch.workers` ranks here."""
    workers = config.launch.workers or default_workers()
    config.rows_per_rank(workers)
    if workers == 1:
        try:
            return run_rank(config, origins, debug, sys.stdout)
        except RankBroke as error:
            return Ending(error.code, str(error))
    return spawn(workers, _train, config, origins, debug, advice="The same command goes on from the newest checkpoint.")


def spawn(workers: int, work: Callable[..., Ending], *arguments: Any, advice: str = "") -> Ending:
    """work(*arguments) in `workers` processes of this machine that `world.connect` joins; the ending of the first that failed,
    or of any, with `advice` where one was killed. Ctrl-C and SIGTERM are handed on to them once, as SIGTERM."""
    # The parent holds the store on a port that the system chose; ranks only connect to it, as under torchrun.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ranks = []
    for rank in range(workers):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main,
            args=(rank, workers, store.port, os.getpid(), theirs, work, arguments),
            name=f"rank-{rank}",
        )
        process.start()
        theirs.close()
        ranks.append(_Rank(process, ours))

    # Ranks ignore the terminal's Ctrl-C: one request is handed on, by this process, once.
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        for process in (rank.process for rank in ranks):
            if process.pid and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _watch(ranks, advice)
    finally:
        for process in (rank.process for rank in ranks):
            if process.is_alive():
                process.kill()
            process.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: Sequence[_Rank], advice: str) -> Ending:
    """Waits for the ranks. When one has failed, the others get a moment to end by themselves; the first failure counts."""
    alive: dict[object, int] = {rank.process.sentinel: number for number, rank in enumerate(ranks)}
    endings: list[Ending] = []
    killed: list[Ending] = []
    while alive:
        failed = killed or any(ending.code not in (OK, STOPPED) for ending in endings)
        ready = wait([ranks[number].process.sentinel for number in alive.values()], timeout=_GRACE_S if failed else None)
        if not ready:
            break
        for sentinel in ready:
            number = alive.pop(sentinel)
            process, ending = ranks[number].process, ranks[number].ending
            process.join()
            if process.exitcode:
                code = process.exitcode
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                killed.append(Ending(FAILED, f"rank {number} of {len(ranks)} {how}. {advice}".rstrip()))
            elif ending.poll():
                endings.append(ending.recv())
    # A killed rank is the cause of what the others then saw.
    return (killed or [ending for ending in endings if ending.code not in (OK, STOPPED)] or endings)[0]


def _rank_main(
    rank: int, size: int, port: int, parent: int, ending: Connection, work: Callable[..., Ending], arguments: tuple[Any, ...]
) -> None:
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    try:
        ending.send(work(*arguments))
    except RankBroke as error:
        ending.send(Ending(error.code, str(error)))
    leave(OK)


def _train(config: Config, origins: dict[str, str], debug: bool) -> Ending:
    return run_rank(config, origins, debug, sys.stdout if os.environ["RANK"] == "0" else None)


def _die_with(parent: int) -> None:
    """No rank outlives the process that started it, whatever ends that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit(UNEXPECTED)
