"""Reports of ranks without progress, and the line that names the cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from clae_dist.reading import ReadError, expect, is_count, is_number, is_text, read_object
from clae_dist.runs.folder import RunFolder

_NAMED = 4  # ranks that a line names one by one
_TEXTS = ("host", "doing", "where", "stack")


@dataclass(frozen=True)
class Phase:
    """The activity of a rank, in the step after `step` others. Compared by identity: a new object means progress."""

    doing: str
    step: int

    def __str__(self) -> str:
        return f"{self.doing}, after step {self.step}"


@dataclass(frozen=True)
class Report:
    """A rank without progress: host, activity and its duration, and the main thread's stack."""

    rank: int
    host: str
    doing: str
    step: int
    quiet_s: float
    where: str  # the innermost function of this package
    stack: str


def read_report(path: Path) -> Report | None:
    """A rank's report; None if it cannot be read, which must not hide the others."""
    fields = {"rank": is_count, "step": is_count, "quiet_s": is_number, **dict.fromkeys(_TEXTS, is_text)}
    try:
        content = read_object(path)
        expect(content, fields)
    except ReadError:
        return None
    return Report(**{key: content[key] for key in fields})


def verdict(reports: Sequence[Report], num_ranks: int, hosts: Sequence[str], folder: Path) -> str:
    """One line that names the rank at fault, its host and its activity. `hosts`: those of all ranks, or empty."""
    first = min(reports, key=lambda report: report.rank)
    silent = [rank for rank in range(num_ranks) if rank not in {report.rank for report in reports}]
    in_data = [report for report in reports if report.doing == "data"]
    elsewhere = _outliers(reports)
    if silent:
        names = name_ranks([(rank, hosts[rank] if hosts else "a host that never answered") for rank in silent])
        cause = f"{names} {_do(silent, 'does', 'do')} not answer: stopped, killed or cut off"
    elif in_data and (len(in_data) < num_ranks or num_ranks == 1):
        cause = f"{_of(in_data)} {_do(in_data, 'waits', 'wait')} for data, which the loader does not give"
    elif in_data:
        cause = f"all ranks wait for data, rank {first.rank} on {first.host} among them: is the storage of the shards stuck?"
    elif elsewhere:
        others = next(report for report in reports if report not in elsewhere)
        cause = (
            f"{_of(elsewhere)} {_do(elsewhere, 'is', 'are')} at {elsewhere[0].doing} in {elsewhere[0].where}, where no other "
            f"rank comes; {_of([others])} is at {others.doing} in {others.where}"
        )
    else:
        place = f"{first.doing} in {first.where}"
        waiting = "the only rank waits" if num_ranks == 1 else f"all {num_ranks} ranks wait"
        cause = f"{waiting} at {place}, such as {_of([first])}: network, device or storage"
    stacks = RunFolder(folder).hang
    return (
        f"no progress for {first.quiet_s:.0f} s after step {first.step}: {cause}. Stacks of all ranks: {stacks}. "
        "The same command resumes from the newest checkpoint."
    )


def culprit(reports: Sequence[Report], num_ranks: int, hosts: Sequence[str]) -> tuple[int, str]:
    """Rank and host at fault; the host is "" where all ranks wait at one place, or it never answered."""
    silent = [rank for rank in range(num_ranks) if rank not in {report.rank for report in reports}]
    if silent:
        return silent[0], host_name(hosts[silent[0]]) if hosts else ""
    in_data = [report for report in reports if report.doing == "data"]
    apart = in_data if in_data and len(in_data) < num_ranks else _outliers(reports)
    if apart:
        first = min(apart, key=lambda report: report.rank)
        return first.rank, host_name(first.host)
    return min(report.rank for report in reports), ""


def host_name(host: str) -> str:
    """Without the process."""
    return host.partition(" (process")[0]


def stacks_by_ranks(reports: Sequence[Report]) -> str:
    """The stacks of the main threads, equal ones once."""
    by_stack = sorted(reports, key=lambda report: (report.stack, report.rank))
    groups = [list(group) for _, group in groupby(by_stack, key=lambda report: report.stack)]
    return "\n".join(f"{_of(group)}: {group[0].doing}, after step {group[0].step}\n{group[0].stack}" for group in groups)


def _outliers(reports: Sequence[Report]) -> list[Report]:
    """The reports at the least common place; of two equally common places, the one without rank 0. [] if all are at one."""
    places: dict[tuple[str, str], list[Report]] = {}
    for report in sorted(reports, key=lambda report: report.rank, reverse=True):
        places.setdefault((report.doing, report.where), []).append(report)
    return min(places.values(), key=len) if len(places) > 1 else []


def _of(reports: Sequence[Report]) -> str:
    return name_ranks(sorted((report.rank, report.host) for report in reports))


def name_ranks(ranks: Sequence[tuple[int, str]]) -> str:
    """Ranks with their hosts, at most four of them one by one."""
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return ", ".join(f"rank {rank} on {host}" for rank, host in ranks[:_NAMED]) + more


def _do(who: Sequence[object], one: str, many: str) -> str:
    return one if len(who) == 1 else many
