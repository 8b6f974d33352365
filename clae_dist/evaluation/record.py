"""What a run folder holds, read for the report; parts that are not there yet are None or empty."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clae_dist.config import Config, ConfigError
from clae_dist.evaluation.interval import interval_text
from clae_dist.recipe import from_yaml
from clae_dist.runs.folder import IDENTITY_FILE
from clae_dist.runs.goodput import Goodput, account, read_lines

Line = dict[str, float]
ACCURACIES = ("knn_before", "knn_after", "linear_before", "linear_after")


@dataclass(frozen=True)
class Record:
    """A run, read back. `lines` has one entry an images_seen, in rising order."""

    run_dir: Path
    config: Config
    config_text: str
    identity: dict[str, Any]
    lines: list[Line]
    train_s: float | None  # seconds of training: time_s counts on over restarts
    evaluation: dict[str, Any] | None
    goodput: Goodput | None = None

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Images seen and values, where `key` was logged."""
        points = [(line["images_seen"], line[key]) for line in self.lines if line.get(key) is not None]
        return [x for x, _ in points], [y for _, y in points]

    @property
    def attacked(self) -> bool:
        return self.config.attack.name != "none"


def read_record(run_dir: Path) -> Record:
    """Raises ConfigError when there is no run in the folder."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"RUN is {str(run_dir)!r}, which holds no config.yaml; name the folder of a run, such as runs/clae.")
    lines = merge_lines(_read_lines(run_dir / "metrics.jsonl"))
    times = read_lines(run_dir)
    return Record(
        run_dir=run_dir,
        config=from_yaml(path),
        config_text=path.read_text(),
        identity=_read_json(run_dir / IDENTITY_FILE) or {},
        lines=lines,
        train_s=max((line["time_s"] for line in lines if "time_s" in line), default=None),
        evaluation=_read_json(run_dir / "evaluation.json"),
        goodput=account(times) if times else None,
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); delete it and run `clae evaluate` again.") from None
    return content


def _read_lines(path: Path) -> list[Line]:
    """Every whole line; the last may be cut off while the run is still writing it."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = []
    for number, text in enumerate(lines, 1):
        try:
            found.append(json.loads(text))
        except ValueError:
            if number < len(lines):
                raise ConfigError(f"{path}:{number} is not valid JSON; the file was damaged, delete that line.") from None
    return found


def merge_lines(raw: Sequence[Line]) -> list[Line]:
    """One line an images_seen: a run that was started again repeats some, and of each key the last value wins."""
    merged: dict[float, Line] = {}
    for line in raw:
        merged.setdefault(line["images_seen"], {}).update(line)
    return [merged[images_seen] for images_seen in sorted(merged)]


def summarise(record: Record) -> dict[str, Any]:
    """The run in a few numbers: what summary.json holds. Accuracies in percent; None for what is not there."""
    evaluation: Mapping[str, Any] = record.evaluation or {}
    rates = record.series("images_per_s")[1]
    losses, clean = record.series("loss")[1], record.series("loss_clean")[1]
    return {
        "name": record.config.name,
        "method": "CLAE" if record.attacked else "SimCLR",
        "images_seen": int(record.lines[-1]["images_seen"]) if record.lines else None,
        "images_per_s": statistics.median(rates) if rates else None,
        "loss": losses[-1] if losses else None,
        "loss_clean": clean[-1] if clean else None,  # comparable between CLAE and SimCLR, whose loss it is
        **{key: evaluation.get(key) for key in ACCURACIES},
        **{f"{key}_interval_percent": evaluation.get(f"{key}_interval_percent") for key in ACCURACIES},
        "world_size": record.identity.get("world_size"),
        "backend": record.identity.get("backend"),
        "collectives": record.identity.get("collectives"),
        "bad_samples": int(next(reversed(record.series("bad_samples")[1]), 0)),
        "skipped_steps": int(next(reversed(record.series("skipped_steps")[1]), 0)),
        "wall_s": record.train_s,
        "goodput": record.goodput.as_dict() if record.goodput else None,
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
        "run_dir": str(record.run_dir),
        "report": str(record.run_dir / "report" / "report.html"),
        "checkpoints": str(record.run_dir / "checkpoints"),
    }


def number(value: float | None, form: str = ",.0f", unit: str = "") -> str:
    """A value for people; a dash where there is none."""
    return "–" if value is None else f"{value:{form}}{unit}"


def change(before: float | None, after: float | None) -> str:
    """ "31.2 % → 43.0 %", or a dash without an evaluation."""
    return "–" if before is None or after is None else f"{before:.1f} % → {after:.1f} %"


def interval_change(summary: Mapping[str, Any], kind: str) -> str:
    """ "29.3 – 31.1 → 40.8 – 42.8", the 95 % intervals in percent."""
    before, after = (summary.get(f"{kind}_{when}_interval_percent") for when in ("before", "after"))
    return "–" if before is None or after is None else f"{interval_text(before)} → {interval_text(after)}"


def summary_table(summary: Mapping[str, Any], compare: Mapping[str, Any] | None = None) -> str:
    """The short table that ends a quickstart; `compare` is the summary of a second run, such as plain SimCLR's."""
    runs = [summary] if compare is None else [summary, compare]
    rows = [
        ["", *(str(run.get("method") or run.get("name") or "") for run in runs)],
        ["images seen", *(number(run.get("images_seen")) for run in runs)],
        ["images/s", *(number(run.get("images_per_s")) for run in runs)],
        ["training time", *(number(run.get("wall_s"), ",.0f", " s") for run in runs)],
        ["loss", *(number(run.get("loss"), ".3f") for run in runs)],
        ["loss between clean views", *(number(run.get("loss_clean"), ".3f") for run in runs)],
        ["kNN, before → after", *(change(run.get("knn_before"), run.get("knn_after")) for run in runs)],
        ["  95 % interval", *(interval_change(run, "knn") for run in runs)],
        ["linear probe, before → after", *(change(run.get("linear_before"), run.get("linear_after")) for run in runs)],
        ["  95 % interval", *(interval_change(run, "linear") for run in runs)],
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *values in rows:
        cells = [name.ljust(widths[0]), *(value.rjust(width) for value, width in zip(values, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * len(runs)))
    lines.append("")
    for run in runs:
        lines.append(f"report       {run.get('report') or '–'}")
        lines.append(f"checkpoints  {run.get('checkpoints') or '–'}")
    return "\n".join(lines)
