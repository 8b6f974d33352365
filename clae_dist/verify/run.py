"""`clae verify` under every launcher.

Under the local launcher, every check has processes of its own: one that crashes or hangs is recorded, and the next one begins.
On the ranks of torchrun or Ray, all checks share these ranks: an error that all ranks raise is recorded and the next check
begins; a rank that crashes ends the command after the record of the checks before it; a check that hangs is recorded after its
limit, and ends the command.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from clae_dist.cores import threads_per_rank
from clae_dist.errors import INTERRUPTED, OK, UNEXPECTED
from clae_dist.launchers.local import default_workers
from clae_dist.launchers.rank import Ending
from clae_dist.launchers.torchrun import num_ranks, say_once
from clae_dist.runs.folder import RunFolder
from clae_dist.verify.check import Check, Subject, Verdict, verdict_of
from clae_dist.verify.plan import checks
from clae_dist.verify.ranks import on_new_ranks, on_these_ranks, timeout_s
from clae_dist.verify.record import Record, Say
from clae_dist.world import connect

_CPU_RANKS = 2  # without GPUs


@dataclass(frozen=True)
class Request:
    """A verification; 0 workers: one rank per GPU, or two on a CPU."""

    subject: Subject
    launcher: str
    only: tuple[str, ...] = ()


def verify(request: Request, say: Say) -> Ending:
    """Run all checks and write the record. The ending's message is the table; its code is 0 if nothing failed.

    Raises ConfigError, StorageError.
    """
    if num_ranks():
        return say_once(_on_started_ranks(replace(request, launcher="torchrun"), say))
    subject = request.subject
    gpus = 0 if subject.device == "cpu" else torch.cuda.device_count()
    workers = subject.workers or (default_workers(subject.device) if gpus else _CPU_RANKS)
    request = replace(request, subject=replace(subject, workers=workers))
    if request.launcher == "ray":
        from clae_dist.launchers.ray_work import run_on_ray

        return run_on_ray(_on_started_ranks, (request, _silent), workers, subject.device, RunFolder(subject.folder).ray)
    return _here(request, say)


def _here(request: Request, say: Say) -> Ending:
    """Every check in processes of its own."""
    subject = request.subject
    plan = checks(subject, request.only)
    record = Record(subject, "local", subject.workers, plan, say)

    def judged(check: Check) -> Verdict:
        if check.runs_on == "host":
            return verdict_of(lambda: check.run(subject))
        return verdict_of(lambda: on_new_ranks(check, subject))

    return _all(plan, judged, record, subject)


def _on_started_ranks(request: Request, say: Say) -> Ending:
    """Every check on the ranks of a launcher, this process being one of them."""
    with connect(timeout_s(request.subject), request.subject.device) as world:
        torch.set_num_threads(threads_per_rank(world.local_size))
        subject = replace(request.subject, workers=world.local_size)
        plan = checks(subject, request.only)
        record = Record(subject, request.launcher, world.size, plan, say) if world.is_main else None
        world.flags_anywhere(False)  # the folder is there

        def judged(check: Check) -> Verdict:
            def on_limit(verdict: Verdict) -> None:
                if record is not None:
                    record.add(check, verdict, subject.limit_s)
                    record.end("hung")

            return on_these_ranks(check, subject, world, on_limit)

        ending = _all(plan, judged, record, subject)
        return Ending(*world.broadcast((ending.code, ending.message)))


def _all(plan: Sequence[Check], judged: Callable[[Check], Verdict], record: Record | None, subject: Subject) -> Ending:
    """Run the checks in turn. Without a record, this is a rank other than the first."""
    how = "finished"
    try:
        for check in plan:
            if record is not None:
                record.begin(check)
            begin = time.monotonic()
            verdict = judged(check)
            if record is not None:
                record.add(check, verdict, time.monotonic() - begin)
    except KeyboardInterrupt:
        how = "interrupted"
    if record is None:
        return Ending(OK, "")
    record.end(how)
    shutil.rmtree(subject.work, ignore_errors=True)
    code = INTERRUPTED if how == "interrupted" else UNEXPECTED if record.failed else OK
    return Ending(code, "\n".join(record.table()))


def _silent(_: str) -> None: ...
