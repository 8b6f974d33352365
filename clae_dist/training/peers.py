"""Notices within guard.lost_s that a host, or the network to it, is gone.

A collective with a lost host waits for its own timeout, and the watchdog for guard.hang_s. Here a thread of each rank counts up
in the store of the process group, beside training: rank 0 reads all counters, the others rank 0's, and a rank that gets no
answer from the store is cut off itself. Then all ranks leave with a code that launchers restart.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from functools import partial

import torch.distributed as dist

from clae_dist.errors import HUNG
from clae_dist.runs.ends import Cause
from clae_dist.runs.mirror import add_to_console
from clae_dist.training.hang_report import name_ranks
from clae_dist.training.session import Session
from clae_dist.training.watch import GRACE_S, within
from clae_dist.world import abandon

_BEATS = 6  # in guard.lost_s
_DONE, _NOTHING = "done", "-"
_VERDICT = "verdict"


class Peers:
    """Context of a run on several hosts. Collective to enter."""

    def __init__(self, session: Session) -> None:
        self._session, self._world = session, session.world
        self._lost_s = session.config.guard.lost_s
        self._beat_s = self._lost_s / _BEATS
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Peers:
        if not self._lost_s or self._session.config.launch.launcher == "local":  # whose launcher sees each end at once
            return self
        store = self._world.own_store(self._beat_s)
        if store is not None:
            self._beats = _Beats(store, self._world.rank, self._world.size)
            self._beats.send(0)
            self._hosts = self._world.gather_objects(self._session.host)  # all counters exist from here on
            self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        beats, before, number = self._beats, time.monotonic(), 0
        quiet_s = dict.fromkeys(beats.watched, 0.0)
        silent_s = 0.0  # without an answer of the store
        while not self._over.wait(self._beat_s):
            number += 1
            # A call over a network that is gone may never return.
            answer = within(self._beat_s, partial(beats.exchange, number))
            verdict, progressed = answer or (_NOTHING, [])
            now = time.monotonic()
            # A machine that slept, or a job that its scheduler suspended, has not been awake to hear anything.
            awake_s, before = min(now - before, 3 * self._beat_s), now
            silent_s = 0.0 if answer else silent_s + awake_s
            if answer:
                quiet_s = {rank: 0.0 if rank in progressed else quiet_s[rank] + awake_s for rank in quiet_s}
            lost = [rank for rank, seconds in quiet_s.items() if seconds > self._lost_s]
            if silent_s > self._lost_s:
                host = self._hosts[0]
                what = f"no answer for {silent_s:.0f} s from the store of the run, which rank 0 on {host} can reach"
                self._leave(what, self._world.local_rank == 0)
            elif lost:
                self._leave(self._give_verdict(lost), self._world.rank == int(lost == [0]), lost[0])
            elif verdict != _NOTHING:
                self._leave(verdict, False)
        within(self._beat_s, beats.end)

    def _give_verdict(self, lost: Sequence[int]) -> str:
        ranks = name_ranks([(rank, self._hosts[rank]) for rank in lost])
        text = f"no answer for {self._lost_s:g} s from {ranks}"
        within(self._beat_s, lambda: self._beats.tell(text))
        return text

    def _leave(self, what: str, aloud: bool, lost: int | None = None) -> None:
        line = (
            f"{what} (guard.lost_s): stopped, killed, or cut off by the network. All ranks leave, and are started again where "
            "the launcher can; the same command resumes from the newest checkpoint."
        )
        if aloud:
            within(GRACE_S, lambda: print(f"clae: {line}", file=sys.stderr, flush=True))
            within(GRACE_S, lambda: self._log(f"{line}\n"))
            within(GRACE_S, lambda: self._record(lost, line))
        abandon(HUNG)

    def _record(self, lost: int | None, line: str) -> None:
        cause: Cause = "network" if lost is None else "host"
        rank = self._world.rank if lost is None else lost
        host = self._hosts[rank].partition(" (process")[0]
        session = self._session
        session.attempt.end(session.config.folder, rank, self._world.size, cause, HUNG, line, host=host)

    def _log(self, text: str) -> None:
        add_to_console(self._session.config.folder, text)


class _Beats:
    """The counters of the ranks in the store, as one rank sees them."""

    def __init__(self, store: dist.Store, rank: int, num_ranks: int) -> None:
        self._store, self._rank = dist.PrefixStore("peers", store), rank
        self.watched = [other for other in range(num_ranks) if other != rank] if rank == 0 else [0]
        self._seen = dict.fromkeys(self.watched, "")
        if rank == 0:
            self.tell(_NOTHING)

    def send(self, number: int) -> None:
        self._store.set(str(self._rank), str(number))

    def exchange(self, number: int) -> tuple[str, list[int]] | None:
        """Send `number`; return the verdict of rank 0, and the ranks that have progressed, or are done, since the last call.

        None without an answer.
        """
        try:
            self.send(number)
            return self._read()
        except dist.DistError:
            return None

    def _read(self) -> tuple[str, list[int]]:
        verdict, *numbers = self._store.multi_get([_VERDICT, *map(str, self.watched)])
        now = {rank: number.decode() for rank, number in zip(self.watched, numbers, strict=True)}
        progressed = [rank for rank, number in now.items() if number in (_DONE,) or number != self._seen[rank]]
        self._seen = now
        return verdict.decode(), progressed

    def tell(self, verdict: str) -> None:
        self._store.set(_VERDICT, verdict)

    def end(self) -> None:
        """This rank leaves the run."""
        self._store.set(str(self._rank), _DONE)
