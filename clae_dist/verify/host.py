"""Checks that are other commands of `clae`: doctor and benches."""

from __future__ import annotations

from typing import Any

from clae_dist.verify.check import SkippedError, Subject, Verdict
from clae_dist.verify.program import CommandError, bench, clae
from clae_dist.wording import count_of

Row = dict[str, Any]


def doctor(subject: Subject) -> Verdict:
    """`clae doctor`; warnings pass."""
    done = clae(["doctor", *subject.words], subject.limit_s)
    lines = done.stdout.splitlines()
    if done.code not in (0, 1) or not lines:
        raise CommandError(done.problem("clae doctor"))
    problems = [" ".join(line.split()[1:]) for line in lines if line.startswith("problem")]
    return Verdict.of(problems or ["a problem was found"] if done.code else [], lines[-1], lines=lines)


def bench_step(subject: Subject) -> Verdict:
    """`clae bench step`."""
    return _bench("step", subject, "exact", "images/s with an exact attack")


def bench_data(subject: Subject) -> Verdict:
    """`clae bench data`."""
    return _bench("data", subject, "ours", "images/s from JPEG to views on one core", case="JPEG to host-ready")


def bench_gpu_counts(subject: Subject) -> Verdict:
    """`clae bench gpu-counts`. Counts do not depend on the machine: what exceeds its limit is named, and no failure."""
    rows: list[Row] = bench("gpu-counts", subject.quick, subject.limit_s)["rows"]
    (waits,) = [row["value"] for row in rows if row["name"] == "host waits of a step"]
    over = [f"{row['name']} {row['value']:g} (at most {row['limit']:g})" for row in rows if not row["within_limit"]]
    found = f"{count_of(waits, 'host wait')} a step, {count_of(len(rows), 'count')}"
    return Verdict("pass", "; ".join([found, *over]), figures={"rows": rows})


def _bench(name: str, subject: Subject, row_name: str, unit: str, case: str = "") -> Verdict:
    """The figures of a bench; it fails if contenders compute different results."""
    try:
        content = bench(name, subject.quick, subject.limit_s)
    except CommandError as error:
        if "ModuleNotFoundError" in str(error):
            raise SkippedError(f"{error}; install the extra bench") from None
        raise
    rows: list[Row] = content["rows"]
    chosen = [row for row in rows if row["what"].startswith(f"{row_name}:") and case in row["case"]]
    figures = [f"{row['more']['images_per_s']:.0f} {unit} ({row['case'].split(',')[0]})" for row in chosen[:3]]
    return Verdict("pass", ", ".join(figures) or count_of(len(rows), "row"), figures={"rows": rows, "notes": content["notes"]})
