"""Run a check on ranks: on new ones of this machine, or on the ranks of a launcher that started them already."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from clae_dist.cores import threads_per_rank
from clae_dist.errors import HUNG, OK, STOPPED, UNEXPECTED
from clae_dist.files import make_folders
from clae_dist.launchers.local import spawn
from clae_dist.launchers.rank import Ending
from clae_dist.verify.check import Check, SkippedError, Subject, Verdict, failure, merged, verdict_of
from clae_dist.world import World, abandon, connect

_STOP_WITHIN_S = 1.0
_LATER_S = 10.0  # other ranks leave a hung check after rank 0, which writes the record


def timeout_s(subject: Subject) -> float:
    """Timeout of collectives: longer than the limit of a check, so that the limit acts first."""
    return 2 * subject.limit_s + 60


def on_new_ranks(check: Check, subject: Subject) -> Verdict:
    """Run a check in `subject.workers` new processes, which may crash or hang. Raises KeyboardInterrupt after Ctrl-C."""
    shutil.rmtree(_errors(subject), ignore_errors=True)
    make_folders(_errors(subject))
    ending = spawn(subject.workers, _rank, check, subject, stop_within_s=_STOP_WITHIN_S, limit_s=subject.limit_s)
    if ending.code == STOPPED:
        raise KeyboardInterrupt
    if ending.code == OK:
        return Verdict(**json.loads(ending.message))
    errors = [json.loads(path.read_text()) for path in _errors(subject).glob("*.json")]
    if ending.code == UNEXPECTED and errors:  # the first one: a rank that left has caused those of the others
        return Verdict(**min(errors, key=lambda error: error["at"])["verdict"])
    return Verdict("fail", reason=ending.message or f"exit code {ending.code}")


def _rank(check: Check, subject: Subject) -> Ending:
    """The work of a rank. A rank that raises an error leaves alone; the launcher then ends the others."""
    rank = 0
    try:
        with connect(timeout_s(subject), subject.device) as world:
            rank = world.rank
            torch.set_num_threads(threads_per_rank(world.local_size))
            return Ending(OK, _encoded(merged(world.gather_objects(check.run(subject, world)))))
    except SkippedError as skipped:
        return Ending(OK, _encoded(Verdict("skipped", reason=str(skipped))))
    except Exception as error:
        verdict = {"at": time.time(), "verdict": asdict(failure(error, rank))}
        (_errors(subject) / f"rank-{rank}.json").write_text(json.dumps(verdict))
        return Ending(UNEXPECTED, "")


def _errors(subject: Subject) -> Path:
    """Folder of the errors that ranks raised in a check."""
    return subject.work / "errors"


def on_these_ranks(check: Check, subject: Subject, world: World, on_limit: Callable[[Verdict], None]) -> Verdict:
    """Run a check on the ranks of `world`; all return the same verdict. Collective.

    A rank that is still in the check after the limit ends its process; rank 0 first calls on_limit(verdict).
    """
    mailbox = _Mailbox(check, world)
    with _limited(subject, world, lambda: on_limit(mailbox.of_failed_ranks(subject.limit_s))):
        if check.runs_on == "host":
            return mailbox.of_main(lambda: verdict_of(lambda: check.run(subject)))
        mailbox.put(verdict_of(lambda: check.run(subject, world), world.rank))
        return mailbox.of_all()


class _Mailbox:
    """The verdicts of ranks in the store of the process group, which works while a rank hangs in a collective."""

    def __init__(self, check: Check, world: World) -> None:
        self._name, self._world = check.name, world
        self._store = None if world.group is None else world.group.get_group_store()
        self._own: Verdict | None = None

    def put(self, verdict: Verdict) -> None:
        self._own = verdict
        if self._store is not None:
            self._store.set(self._key(self._world.rank), _encoded(verdict))

    def of_all(self) -> Verdict:
        """The merged verdict, after all ranks have put theirs."""
        return merged([self._of(rank) for rank in range(self._world.size)])

    def of_main(self, run: Callable[[], Verdict]) -> Verdict:
        """The verdict of `run` on rank 0."""
        if self._world.is_main:
            self.put(run())
        return self._of(0)

    def of_failed_ranks(self, limit_s: float) -> Verdict:
        """The verdict of a check that has not ended: the failures so far, and the ranks without a result."""
        ranks = range(self._world.size)
        ended = [rank for rank in ranks if self._store is not None and self._store.check([self._key(rank)])]
        missing = ", ".join(str(rank) for rank in ranks if rank not in ended)
        hung = f"rank {missing} had no result after {limit_s:g} s"
        failed = [verdict for verdict in map(self._of, ended) if verdict.state == "fail"]
        return replace(failed[0], reason=f"{failed[0].reason}; {hung}") if failed else Verdict("fail", reason=hung)

    def _of(self, rank: int) -> Verdict:
        if self._store is None:
            assert self._own is not None
            return self._own
        return Verdict(**json.loads(self._store.get(self._key(rank))))

    def _key(self, rank: int) -> str:
        return f"verify/{self._name}/{rank}"


@contextmanager
def _limited(subject: Subject, world: World, on_limit: Callable[[], None]) -> Iterator[None]:
    def expire() -> None:
        try:
            if world.is_main:
                on_limit()
        finally:
            abandon(HUNG)

    timer = threading.Timer(subject.limit_s + (0 if world.is_main else _LATER_S), expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _encoded(verdict: Verdict) -> str:
    return json.dumps(asdict(verdict), default=str)
