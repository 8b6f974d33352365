"""Ranks as processes of this machine; one rank runs in this very process."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.reduction import DupFd
from types import FrameType
from typing import Any

import torch

from clae_dist.config import Config
from clae_dist.devices import Request
from clae_dist.errors import FAILED, HUNG, MEMORY, NETWORK, OK, STOPPED, Cause, restarts
from clae_dist.escape import say
from clae_dist.launchers.loopback import loopback_store, use_loopback
from clae_dist.launchers.out_of_memory import num_killed as out_of_memory_kills
from clae_dist.launchers.rank import START, Console, Ending, RankBroke, run_rank, useless_restart
from clae_dist.launchers.terminal import announce, lines_shown_on_stdout
from clae_dist.lifetime import begin_forked_process, dedicate_process, fork_server
from clae_dist.recipe import Recipe
from clae_dist.runs.ends import Attempt, read_ends
from clae_dist.runs.heartbeat import read_heartbeat
from clae_dist.staging import shown_path
from clae_dist.training import guard
from clae_dist.training.guard import STOP_SIGNALS
from clae_dist.world import leave

_GRACE_S = 10.0  # how long ranks may live after one of them has failed
_HUNG_GRACE_S = 5.0  # where they have given up together
_POLL_S = 1.0
_CAUSES: dict[int, Cause] = {signal.SIGKILL: "host", signal.SIGBUS: "memory"}  # of a signal; a full /dev/shm is SIGBUS
_ADVICE = "The same command resumes from the newest checkpoint."


@dataclass(frozen=True)
class _Rank:
    process: ForkServerProcess
    ending: Connection  # what run_rank returned comes through it


def default_workers(device: Request) -> int:
    """One rank a GPU; one without GPUs, and where launch.device asks for the CPU."""
    return 1 if device == "cpu" else max(1, torch.cuda.device_count())


def launch(recipe: Recipe, *, debug: bool = False, work: Callable[..., Ending] | None = None) -> Ending:
    """Train with `launch.workers` ranks here (each does `work`, train as a rule).

    A rank that breaks alone (errors.py), is killed or hangs costs the steps since the newest checkpoint: all are started
    again, `launch.max_failures` times. A single rank runs in this very process, where only the user can start it again.
    """
    config = recipe.config
    workers = config.launch.workers or default_workers(config.launch.device)
    config.rows_per_rank(workers)
    if workers == 1:
        return _ending(work or _train, recipe, debug)
    announce(f"starting {workers} ranks on this machine; {shown_path(config.folder)}/console.log keeps what they say")
    num_ends = len(read_ends(config.folder))
    for failure in range(1, config.launch.max_failures + 2):
        begun = time.time()
        os.environ[START] = repr(begun)
        ending = spawn(workers, work or _train, recipe, debug, advice=_ADVICE, stop_within_s=config.guard.stop_within_s)
        del os.environ[START]
        _record_vanished(config, ending, workers, begun)
        if not ending.again or failure > config.launch.max_failures:
            break
        if useless := useless_restart(config, num_ends):
            return useless
        reason = ending.message.removesuffix(_ADVICE).strip().removesuffix(".")
        line = f"{reason}. Starting again (failure {failure} of {config.launch.max_failures})."
        say(line, file=Console(config, sys.stderr), flush=True)
    return ending


def _record_vanished(config: Config, ending: Ending, workers: int, begun: float) -> None:
    """Record the end of a rank that could not do it: a signal killed it."""
    if ending.vanished is None or not ending.cause:
        return
    beat = read_heartbeat(config.folder)
    attempt = Attempt(begun, beat.step if beat is not None and beat.start == begun else 0)
    reason = ending.message.removesuffix(_ADVICE).strip()
    digest = "out of memory" if ending.cause == "memory" else ""
    attempt.end(config.folder, ending.vanished, workers, ending.cause, ending.code, reason, digest)


def spawn(
    workers: int,
    work: Callable[..., Ending],
    *arguments: Any,
    advice: str = "",
    stop_within_s: float = 0.0,
    limit_s: float = 0.0,
) -> Ending:
    """work(*arguments) in `workers` processes of this machine that `world.connect` joins; the ending of the first that failed,
    or of any, with `advice` where one was killed.

    The first Ctrl-C, SIGTERM or SIGUSR1 is handed on to them as SIGTERM, and with `stop_within_s` they are killed when they
    are still there somewhat later; Ctrl-C again ends at once. After `limit_s` (0: no limit) ranks are killed, with code HUNG.
    """
    # The parent holds the store on a port that the system chose; ranks only connect to it, as under torchrun.
    store = loopback_store()
    context = _fork_server()
    ranks: list[_Rank] = []
    asked = context.Value("i", 0, lock=False)
    request = _Request(ranks, asked)
    # Ranks ignore the terminal's Ctrl-C: one request is handed on, by this process, once.
    before = {number: signal.signal(number, request.on_signal) for number in STOP_SIGNALS}
    try:
        for rank in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            spot = _Spot(rank, workers, store.port, dict(os.environ))
            process = context.Process(
                target=_rank_main, args=(spot, [DupFd(1), DupFd(2)], theirs, asked, work, arguments), name=f"rank-{rank}"
            )
            process.start()
            theirs.close()
            ranks.append(_Rank(process, ours))
        request.hand_on()  # one that came before they had started
        return _watch(ranks, request, advice, stop_within_s, limit_s)
    finally:
        for process in (rank.process for rank in ranks):
            if process.is_alive():
                process.kill()
            process.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _fork_server() -> ForkServerContext:
    """Start the process that ranks are forked from, unless it runs already.

    Signals to a whole terminal or job stay pending there: only the ranks act on them, once they have started.
    """
    context = fork_server("clae_dist.launchers.preload")
    resource_tracker.ensure_running()  # which unblocks signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


class _Request:
    """A stop request of a user or a scheduler, passed on to the ranks."""

    def __init__(self, ranks: Sequence[_Rank], number: Any) -> None:
        self._ranks, self._number = ranks, number
        self.name = ""
        self._asked_at = 0.0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name, self._asked_at = signal.Signals(number).name, time.monotonic()
        self._number.value = number  # ranks name what the user sent, not what is handed on
        self.hand_on()

    def hand_on(self) -> None:
        """Send SIGTERM to the ranks that have started, if there is a request."""
        for process in (rank.process for rank in self._ranks):
            if self.name and process.pid and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)

    def left_s(self, within_s: float) -> float:
        """Until ranks that do not leave are killed."""
        return max(0.0, self._asked_at + within_s + _GRACE_S - time.monotonic())


def _watch(ranks: Sequence[_Rank], request: _Request, advice: str, stop_within_s: float, limit_s: float) -> Ending:
    """Waits for the ranks. When one has failed, the others get a moment to end by themselves; the first failure counts."""
    alive: dict[Any, int] = {rank.process.sentinel: number for number, rank in enumerate(ranks)}
    endings: list[Ending] = []
    killed: list[Ending] = []
    deadline = time.monotonic() + limit_s if limit_s else float("inf")
    out_of_memory = out_of_memory_kills()
    while alive:
        if time.monotonic() > deadline and not request.name:
            return Ending(HUNG, f"rank {', '.join(map(str, sorted(alive.values())))} had no result after {limit_s:g} s")
        failed = killed or any(ending.code not in (OK, STOPPED) for ending in endings)
        asked = request.left_s(stop_within_s) if request.name and stop_within_s else None
        patience_s = (_HUNG_GRACE_S if killed and killed[0].code == HUNG else _GRACE_S) if failed else _POLL_S
        ready = wait(list(alive), timeout=patience_s if asked is None else min(asked, patience_s))
        if not ready and (failed or asked == 0.0):
            break  # those that are left are killed
        for sentinel in ready:
            number = alive.pop(sentinel)
            process, ending = ranks[number].process, ranks[number].ending
            process.join()
            if process.exitcode:
                no_memory = process.exitcode == -signal.SIGKILL and out_of_memory_kills() > out_of_memory
                asked_by = request.name if stop_within_s else ""
                killed.append(_how_it_died(number, len(ranks), process.exitcode, asked_by, advice, no_memory=no_memory))
            elif ending.poll():
                endings.append(ending.recv())
    return _sum_up(killed, endings, request.name, advice)


def _sum_up(killed: list[Ending], endings: list[Ending], asked: str, advice: str) -> Ending:
    """The cause: ranks that were killed, then those that left unsaved because they were asked to, then what others say."""
    lost = [ending for ending in killed if ending.code != STOPPED]
    unsaved = [ending for ending in killed if ending.code == STOPPED]
    failed = [ending for ending in endings if ending.code not in (OK, STOPPED)]
    failed.sort(key=lambda ending: ending.code == NETWORK)  # ranks lose their connection to the one that failed
    for found in (lost, [] if unsaved else failed, [ending for ending in endings if ending.code == STOPPED], unsaved, endings):
        if found:
            return replace(found[0], again=found[0].again and not asked)
    return Ending(STOPPED, f"{asked}: the ranks did not leave in time and were killed. {advice}".rstrip())


def _how_it_died(number: int, num_ranks: int, code: int, asked: str, advice: str, *, no_memory: bool = False) -> Ending:
    if code == HUNG:
        return Ending(HUNG, f"rank {number} of {num_ranks} left because the run hung. {advice}".rstrip(), again=restarts(HUNG))
    if code == STOPPED or (asked and -code in STOP_SIGNALS):  # it had not come so far as to listen
        return Ending(
            STOPPED, f"rank {number} of {num_ranks} was asked to stop and left with nothing new saved. {advice}".rstrip()
        )
    if no_memory:
        text = (
            f"rank {number} of {num_ranks} was killed by SIGKILL: the kernel ended it because memory was used up; use fewer "
            f"loader processes (data.workers), a smaller batch.micro_size, or a machine or container with more memory. {advice}"
        )
        return Ending(MEMORY, text.rstrip(), again=restarts(code), cause="memory", vanished=number)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    text = f"rank {number} of {num_ranks} {how}. {advice}".rstrip()
    if code > 0:  # it has recorded why
        return Ending(FAILED, text, again=restarts(code))
    return Ending(FAILED, text, again=restarts(code), cause=_CAUSES.get(-code, "code"), vanished=number)


@dataclass(frozen=True)
class _Spot:
    """Where a rank belongs, and the launcher's environment (the fork server's may be older)."""

    rank: int
    size: int
    port: int
    environment: Mapping[str, str]

    def set_environment(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        use_loopback()
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.size),
            LOCAL_RANK=str(self.rank),
            LOCAL_WORLD_SIZE=str(self.size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(self.port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )


def _rank_main(
    spot: _Spot,
    streams: Sequence[Any],
    ending: Connection,
    asked: Any,
    work: Callable[..., Ending],
    arguments: tuple[Any, ...],
) -> None:
    guard.handed_on = lambda: int(asked.value)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    for target, stream in enumerate(streams, start=1):  # a signal now would break the launcher's side of it, so it waits
        os.dup2(stream.detach(), target)
    begin_forked_process()
    dedicate_process()
    spot.set_environment()
    ending.send(_ending(work, *arguments))
    leave(OK)


def _ending(work: Callable[..., Ending], *arguments: Any) -> Ending:
    try:
        return work(*arguments)
    except RankBroke as error:
        return error.ending()


def _train(recipe: Recipe, debug: bool = False) -> Ending:
    return run_rank(recipe, lines_shown_on_stdout(os.environ.get("RANK", "0")), debug=debug)
