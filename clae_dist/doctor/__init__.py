"""`clae doctor`: check a machine and a recipe, and print each problem with a way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from clae_dist.config import Config
from clae_dist.doctor import collectives
from clae_dist.doctor.finding import Finding
from clae_dist.doctor.machine import clock, devices, limits, open_files, shared_memory
from clae_dist.doctor.software import packages, python
from clae_dist.doctor.stores import disk, mlflow_store, run_bucket, shards
from clae_dist.wording import count_of

Say = Callable[[str], None]


def run_doctor(config: Config | None, say: Say) -> int:
    """Check this machine, and the data and tracking of a recipe; print a table. Returns 0, or 1 if there is a problem."""
    counts = {"ok": 0, "warning": 0, "problem": 0}
    for finding in _findings(config):
        counts[finding.level] += 1
        say(f"{finding.level:<8}  {finding.what:<15}  {finding.found}")
        if finding.advice:
            say(f"{'':<8}  {'':<15}  -> {finding.advice}")
    say(f"{counts['ok']} ok, {count_of(counts['warning'], 'warning')}, {count_of(counts['problem'], 'problem')}")
    return 1 if counts["problem"] else 0


def _findings(config: Config | None) -> Iterator[Finding]:
    yield from python()
    software = list(packages())
    yield from software
    if any(finding.what == "torch" and finding.level == "problem" for finding in software):
        return  # the other checks need it
    for check in (devices, limits, shared_memory, open_files, clock, collectives.check):
        yield from check()
    for check_run in (disk, run_bucket, mlflow_store, shards):
        yield from check_run(config)
