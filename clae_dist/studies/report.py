"""The report of a study: table on the console, study.html, cells.csv, table.csv and table.tex in the study's folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clae_dist.evaluation.interval import Mean
from clae_dist.files import make_folders, write_together
from clae_dist.page import data_uri, render
from clae_dist.studies.cells import StudyPlan
from clae_dist.studies.curves import draw_curves
from clae_dist.studies.results import CellResult, Table, read_results, tabulate
from clae_dist.studies.tracking import track_study
from clae_dist.wording import count_of

PAGE, TABLE, CELLS, LATEX = "study.html", "table.csv", "cells.csv", "table.tex"
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", **{c: f"\\{c}" for c in "&%$#_{}"}}


def write_study_report(plan: StudyPlan) -> Iterator[str]:
    """Write the report of the finished cells, record the study in MLflow, and yield the table as lines.

    Raises ConfigError for cells of different sets, StorageError if a file cannot be written.
    """
    results = read_results(plan)
    tables = tabulate(plan, results)
    folder = plan.study.folder
    make_folders(folder)
    files = {
        PAGE: render("clae_dist", "study.html", **_page(plan, results, tables)),
        TABLE: _csv(_table_rows(tables)),
        CELLS: _csv(_cell_rows(results)),
        LATEX: latex(tables),
    }
    write_together({folder / name: text.encode() for name, text in files.items()})
    note = track_study(plan, results, tables, [folder / name for name in files])
    return iter([*table_lines(plan, results, tables), f"page: {folder / PAGE}", *([note] if note else [])])


def table_lines(plan: StudyPlan, results: Sequence[CellResult], tables: Sequence[Table]) -> Iterator[str]:
    """The tables for the console."""
    yield progress_of(plan, results)
    for table in tables:
        yield f"{table.title}: mean over seeds ± half of its 95 % interval; difference to {plan.study.baseline} by seed"
        width = max(len(row.method) for row in table.rows)
        for row in table.rows:
            difference = "" if row.difference is None else f"{mean_text(row.difference, '+.2f'):>18}  {row.verdict}"
            yield f"  {row.method:{width}}  {mean_text(row.mean):>16}  n={row.mean.num}{difference}".rstrip()


def progress_of(plan: StudyPlan, results: Sequence[CellResult]) -> str:
    cells = plan.of("compare")
    if len(results) == len(cells):
        return f"{count_of(len(cells), 'cell')}, all finished"
    return f"{len(results)} of {count_of(len(cells), 'cell')} finished: the results are preliminary"


def mean_text(mean: Mean, form: str = ".2f") -> str:
    """ "45.13 ± 0.24", or the value alone of a single run."""
    return f"{mean.value:{form}}" + ("" if mean.half is None else f" ± {mean.half:.2f}")


# ---- CSV and LaTeX ----


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def _table_rows(tables: Sequence[Table]) -> list[list[Any]]:
    head = ["protocol", "method", "seeds", "mean", "low", "high", "difference", "difference_low", "difference_high"]
    return [
        head,
        *(
            [table.protocol, row.method, row.mean.num, *_ends(row.mean), *_ends(row.difference)]
            for table in tables
            for row in table.rows
        ),
    ]


def _ends(mean: Mean | None) -> list[Any]:
    """Value and interval; empty where unknown."""
    if mean is None:
        return ["", "", ""]
    return [mean.value, *(mean.interval or ("", ""))]


def _cell_rows(results: Sequence[CellResult]) -> list[list[Any]]:
    head = [
        "method",
        "seed",
        "steps",
        "images_seen",
        "encoder_passes",
        "train_s",
        "protocol",
        "metric",
        "before",
        "after",
        "run",
    ]
    rows: list[list[Any]] = [head]
    for one in results:
        cell = one.cell
        facts = [cell.method, cell.seed, cell.steps, one.images_seen, cell.passes, one.train_s]
        for protocol, metrics in one.results.items():
            for metric, values in metrics.items():
                rows.append([*facts, protocol, metric, values.get("before", ""), values.get("after", ""), cell.folder])
    return rows


def latex(tables: Sequence[Table]) -> str:
    """One tabular with a column for each protocol; needs the package booktabs."""
    methods = list(dict.fromkeys(row.method for table in tables for row in table.rows))
    lines = [f"\\begin{{tabular}}{{l{'r' * len(tables)}}}", "\\toprule"]
    lines.append(" & ".join(["method", *(_tex(table.title) for table in tables)]) + " \\\\")
    lines.append("\\midrule")
    for method in methods:
        means = [next((row.mean for row in table.rows if row.method == method), None) for table in tables]
        cells = ["--" if mean is None else f"${mean_text(mean).replace('±', chr(92) + 'pm')}$" for mean in means]
        lines.append(" & ".join([_tex(method), *cells]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


# ---- page ----


def _page(plan: StudyPlan, results: Sequence[CellResult], tables: Sequence[Table]) -> dict[str, Any]:
    """The values in templates/study.html."""
    study = plan.study
    budget = f"{study.budget.kind} {study.budget.amount:g}"
    if plan.passes is not None:
        budget = f"{plan.passes:,.0f} encoder passes"
    return {
        "title": f"study {study.name}",
        "name": study.name,
        "facts": f"{plan.manifest.name} · seeds {', '.join(map(str, study.seeds))} · budget of a cell: {budget}",
        "progress": progress_of(plan, results),
        "baseline": study.baseline,
        "tables": tables,
        "curves": [
            {"title": title, "png": png}
            for title, png in draw_curves(results, [m.name for m in study.methods], plan.passes is not None)
        ],
        "cells": [
            {
                "title": one.cell.title,
                "steps": f"{one.cell.steps:,}",
                "passes": "–" if one.cell.passes is None else f"{one.cell.passes:,.0f}",
                "seconds": "–" if one.train_s is None else f"{one.train_s:,.0f}",
                "run": _relative(one.cell.folder, study.folder),
            }
            for one in results
        ],
        "selections": list(_selections(plan)),
        "mean_text": mean_text,
        "data_uri": data_uri,
    }


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder))


def _selections(plan: StudyPlan) -> Iterator[dict[str, Any]]:
    for cell in plan.of("select"):
        score = cell.score()
        setting = ", ".join(f"{key}={value}" for key, value in cell.chosen.items())
        yield {"method": cell.method, "setting": setting, "score": "–" if score is None else f"{score:.2f} %"}
