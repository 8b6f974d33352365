"""The content of a run folder, read for the report; missing parts are None or empty."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clae_dist.config import Config
from clae_dist.errors import ConfigError
from clae_dist.escape import shown
from clae_dist.evaluation.interval import interval_text
from clae_dist.evaluation.metrics import Metrics, read_metrics
from clae_dist.evaluation.protocol import WHEN, Headline, headlines
from clae_dist.evaluation.stored import read_evaluation
from clae_dist.reading import ReadError, read_text
from clae_dist.runs.ends import End, read_ends
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.goodput import Goodput, account, read_lines


@dataclass(frozen=True)
class RunRecord:
    """The files of a run. `ignored` has a sentence about each part that is not used."""

    run_dir: Path
    config: Config
    config_text: str
    identity: dict[str, Any]
    metrics: Metrics
    evaluation: dict[str, Any] | None
    goodput: Goodput | None = None
    ends: tuple[End, ...] = ()
    ignored: tuple[str, ...] = ()


def read_record(run_dir: Path) -> RunRecord:
    """Read a run. Raises ConfigError if the folder is no run, or its config.yaml or run.json is damaged."""
    folder = RunFolder(run_dir)
    folder.require()
    metrics, ignored = read_metrics(folder.metrics_file)
    evaluation, damage = read_evaluation(folder.evaluation_file)
    times = read_lines(run_dir, ignored.append)
    try:
        config_text = read_text(folder.config_file)
    except ReadError as error:
        raise ConfigError(f"{folder.config_file} cannot be read ({error}); restore it from a copy.") from None
    return RunRecord(
        run_dir=run_dir,
        config=folder.read_config(),
        config_text=config_text,
        identity=vars(folder.read_identity()) if folder.identity_file.exists() else {},
        metrics=metrics,
        evaluation=evaluation,
        goodput=account(times) if times else None,
        ends=tuple(read_ends(run_dir, ignored.append)),
        ignored=tuple(text for text in (*ignored, damage) if text),
    )


def summarise(record: RunRecord) -> dict[str, Any]:
    """The content of summary.json: the run in a few numbers. Accuracies in percent; None for missing values."""
    evaluation: Mapping[str, Any] = record.evaluation or {}
    rates, metrics = record.metrics.rates.y, record.metrics
    folder = RunFolder(record.run_dir)
    return {
        "name": record.config.name,
        "method": record.config.method.title or record.config.method.name,
        "images_seen": metrics.images_seen,
        "images_per_s": statistics.median(rates) if rates else None,
        "loss": metrics.last("loss"),
        "loss_clean": metrics.last("loss_clean"),  # comparable between CLAE and SimCLR, whose loss it is
        "results": evaluation.get("results", {}),
        "titles": {name: protocol["title"] for name, protocol in evaluation.get("protocols", {}).items()},
        "units": {name: protocol.get("unit", "%") for name, protocol in evaluation.get("protocols", {}).items()},
        "world_size": record.identity.get("world_size"),
        "backend": record.identity.get("backend"),
        "collectives": record.identity.get("collectives"),
        "bad_samples": int(metrics.last("bad_samples") or 0),
        "skipped_steps": int(metrics.last("skipped_steps") or 0),
        "wall_s": metrics.train_s,
        "goodput": record.goodput.as_dict() if record.goodput else None,
        "last_end": record.ends[-1].describe() if record.ends else None,
        "evaluation_wall_s": evaluation.get("wall_s"),
        "encoder": record.config.model.encoder,
        "epochs": record.config.train.epochs,
        "global_batch": record.config.batch.global_size,
        "train_images": evaluation.get("train_images"),
        "bank_images": evaluation.get("bank_images"),
        "test_images": evaluation.get("test_images"),
        "manifest_digest": record.identity.get("manifest_digest") or evaluation.get("manifest_digest"),
        "package_version": record.identity.get("package_version"),
        "git_revision": record.identity.get("git_revision"),
        "parent": record.identity.get("parent", {}).get("run"),
        "run_dir": str(record.run_dir),
        "report": str(folder.report_page),
        "checkpoints": str(folder.checkpoints),
    }


def number(value: float | None, form: str = ",.0f", unit: str = "") -> str:
    """A formatted value, or a dash without one."""
    return "–" if value is None else f"{value:{form}}{unit}"


def _result_rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Two rows per protocol that any of the runs has results of: headline and 95 % interval."""
    titles: dict[str, str] = {}
    for run in runs:
        titles |= {name: (run.get("titles") or {}).get(name, name) for name in run.get("results") or {}}
    rows = []
    for name, title in titles.items():
        pairs = [headlines(run.get("results") or {}, name, (run.get("units") or {}).get(name, "%")) for run in runs]
        rows.append([f"{shown(title)}, before → after", *(change(pair) for pair in pairs)])
        rows.append(["  95 % interval", *(_interval_change(pair) for pair in pairs)])
    return rows


def change(pair: Mapping[str, Headline]) -> str:
    """ "31.2 % → 43.0 %", or a dash without an evaluation."""
    return " → ".join(pair[when].text() for when in WHEN) if set(pair) == set(WHEN) else "–"


def _interval_change(pair: Mapping[str, Headline]) -> str:
    """ "29.3 – 31.1 → 40.8 – 42.8", the 95 % intervals in percent."""
    known = set(pair) == set(WHEN) and all(headline.interval for headline in pair.values())
    return " → ".join(interval_text(pair[when].interval) for when in WHEN) if known else "–"


def _heads(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Column headers: the method of a single run, else the names of the runs, or what distinguishes them."""
    if len(runs) == 1:
        return [str(runs[0].get("method") or runs[0].get("name") or "")]
    folders = [str(run.get("run_dir") or "") for run in runs]
    names, methods = ([str(run.get(key) or "") for run in runs] for key in ("name", "method"))
    for heads in (names, methods, [Path(folder).name for folder in folders], folders):
        if all(heads) and len(set(heads)) == len(heads):
            return heads
    return [f"run {number}" for number in range(1, len(runs) + 1)]


def summary_table(*runs: Mapping[str, Any], more_rows: Sequence[tuple[str, Sequence[str]]] = ()) -> str:
    """A table with one column per summary, of the run and those it is compared with.

    Args:
        more_rows: further rows, each a name and a value for every run, below a rule of their own.
    """
    rows = [
        ["", *map(shown, _heads(runs))],
        *([["method", *(shown(run.get("method") or "–") for run in runs)]] if len(runs) > 1 else []),
        ["images seen", *(number(run.get("images_seen")) for run in runs)],
        ["images/s", *(number(run.get("images_per_s")) for run in runs)],
        ["training time", *(number(run.get("wall_s"), ",.0f", " s") for run in runs)],
        ["loss", *(number(run.get("loss"), ".3f") for run in runs)],
        ["loss between clean views", *(number(run.get("loss_clean"), ".3f") for run in runs)],
        *_result_rows(runs),
    ]
    num_rows = len(rows)
    rows += [[name, *values] for name, values in more_rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *values in rows:
        cells = [name.ljust(widths[0]), *(value.rjust(width) for value, width in zip(values, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * (sum(widths) + 2 * len(runs))
    if more_rows:
        lines[num_rows:num_rows] = [rule, "settings that differ"]
    lines.insert(1, rule)
    lines.append("")
    for run in runs:
        lines.append(f"report       {shown(run.get('report') or '–')}")
        lines.append(f"checkpoints  {shown(run.get('checkpoints') or '–')}")
    return "\n".join(lines)
