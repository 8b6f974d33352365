"""`clae runs`: every run folder below a folder, with state, progress and last metrics.

Only the ends of the files of a run are read, so that the time does not grow with the length of the runs.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from clae_dist import core_yaml
from clae_dist.escape import shown
from clae_dist.lease import EXPIRY_S, holder_of
from clae_dist.reading import ReadError, is_number, open_regular, parse_line, read_object, read_text
from clae_dist.runs.ends import read_ends
from clae_dist.runs.folder import CHECKPOINTS, CONFIG_FILE, IDENTITY_FILE, RunFolder

State = Literal["running", "finished", "stopped", "dead", "damaged"]
_TAIL_BYTES = 32 << 10  # of metrics.jsonl: some thirty lines
_MAX_CONFIG_BYTES = 256 << 10
_MAX_DEPTH = 8  # of folders below the one that is listed
_SHOWN = ("loss", "knn_accuracy", "images_per_s")
_HEADS = ("run", "state", "method", "progress", "loss", "kNN", "images/s", "last sign of life", "last end")
_FORMS = ("{:.3f}", "{:.1f} %", "{:,.0f}")
_SETTINGS = {  # of a resolved config.yaml, whose layout recipe.to_yaml determines
    "name": re.compile(r"^name: (.*)$", re.MULTILINE),
    "method": re.compile(r"^method:\n(?:  .*\n)*?  name: (.*)$", re.MULTILINE),
    "epochs": re.compile(r"^train:\n(?:  .*\n)*?  epochs: (.*)$", re.MULTILINE),
}


@dataclass(frozen=True)
class ListedRun:
    """A run folder. `progress` is a share of the run's length, `since` a time in seconds since 1970."""

    folder: str
    state: State
    name: str = ""
    method: str = ""
    epochs: float | None = None
    epoch: float | None = None
    step: int | None = None
    progress: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    since: float | None = None  # of the last sign of life
    held_by: str = ""  # the process that trains
    problem: str = ""
    cause: str = ""  # of the last end

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def list_runs(folder: Path) -> list[ListedRun]:
    """The runs in `folder` and below it, sorted by their paths. A damaged one is an entry with its problem."""
    return [_read_run(path) for path in sorted(_find(str(folder), _MAX_DEPTH))]


def _find(folder: str, depth: int) -> Iterator[str]:
    """Folders with a config.yaml and a run.json or checkpoints. Neither links nor what is inside of a run is searched."""
    try:
        with os.scandir(folder) as scan:
            entries = list(scan)
    except OSError:
        return
    names = {entry.name for entry in entries}
    if CONFIG_FILE in names and names & {IDENTITY_FILE, CHECKPOINTS}:
        yield folder
    elif depth:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _find(entry.path, depth - 1)


def _read_run(path: str) -> ListedRun:
    folder = RunFolder(Path(path))
    try:
        settings = _settings(read_text(folder.config_file, _MAX_CONFIG_BYTES))
        read_object(folder.identity_file, 1 << 20)
        metrics, last_s = _last_metrics(folder.metrics_file)
    except ReadError as error:
        return ListedRun(path, "damaged", problem=str(error))
    epochs, epoch, step = settings.get("epochs"), metrics.get("epoch"), metrics.get("step")
    if epochs is None:
        return ListedRun(path, "damaged", problem=f"{CONFIG_FILE} has no train.epochs")
    progress = None if epoch is None or not epochs else min(1.0, epoch / epochs)
    # A run ends with the step that is nearest to its epochs.
    ended = epoch is not None and bool(step) and round(epochs * step / epoch) <= step if epoch else False
    state, since, held_by = _state(folder, ended, last_s)
    return ListedRun(
        path,
        state,
        name=settings["name"],
        method=settings["method"],
        epochs=epochs,
        epoch=epoch,
        step=None if step is None else int(step),
        progress=1.0 if ended else progress,
        metrics={key: metrics[key] for key in _SHOWN if key in metrics},
        since=since,
        held_by=held_by,
        cause=ends[-1].cause if (ends := read_ends(folder.path)) else "",
    )


def _settings(text: str) -> dict[str, Any]:
    found = {key: _value(match[1]) if (match := pattern.search(text)) else "" for key, pattern in _SETTINGS.items()}
    try:
        epochs: float | None = float(found["epochs"])
    except ValueError:
        epochs = None
    return {**found, "epochs": epochs if is_number(epochs) else None}


def _value(text: str) -> str:
    """A value of a line of YAML, without the comment behind it. Raises ReadError."""
    if text[:1] not in ("'", '"'):
        return text.partition("  # ")[0].strip()
    try:
        return str(core_yaml.construct(core_yaml.compose(text)))  # type: ignore[arg-type]  # a quote begins a scalar
    except (yaml.YAMLError, ValueError) as error:
        raise ReadError(f"{CONFIG_FILE} is not valid YAML: {' '.join(str(error).split())[:100]}") from None


def _last_metrics(path: Path) -> tuple[dict[str, float], float | None]:
    """The last value of each metric in the end of the file, and when the file was changed."""
    if not path.exists():
        return {}, None
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read(_TAIL_BYTES).splitlines(keepends=True)
        changed = os.fstat(file.fileno()).st_mtime
    if size > _TAIL_BYTES:
        lines = lines[1:]  # cut in the middle
    values = [line for text in lines if (line := parse_line(text)) is not None]
    if lines and not values:
        raise ReadError(f"{path.name} ends with {len(lines)} lines that hold no metrics")
    metrics: dict[str, float] = {}
    for line in values:
        metrics.update({key: value for key, value in line.items() if is_number(value)})
    return metrics, changed


def _state(folder: RunFolder, ended: bool, last_s: float | None) -> tuple[State, float | None, str]:
    """State, the time of the last sign of life, and the process that trains."""
    lease = folder.training_lease
    try:
        beat_s = lease.stat().st_mtime
    except OSError:
        return "finished" if ended else "stopped", last_s, ""
    holder = holder_of(lease)
    runs = holder.runs() if holder else None
    if runs is None:  # a process of another machine, of which only the file can be seen
        runs = time.time() - beat_s < EXPIRY_S
    if runs:
        return "running", max(beat_s, last_s or 0.0), str(holder or "")
    return "finished" if ended else "dead", max(beat_s, last_s or 0.0), ""


def table_of(runs: list[ListedRun], folder: Path, now: float) -> Iterator[str]:
    """The runs as the lines of a table."""
    rows: list[tuple[str, ...]] = [
        ("run", "state", "method", "progress", "loss", "kNN", "images/s", "last sign of life", "last end")
    ]
    for run in runs:
        if run.problem:
            rows.append((os.path.relpath(run.folder, folder), f"damaged: {run.problem}", *[""] * (len(_HEADS) - 2)))
            continue
        values = [run.metrics.get(key) for key in _SHOWN]
        numbers = ["–" if value is None else form.format(value) for value, form in zip(values, _FORMS, strict=True)]
        rows.append(
            (
                os.path.relpath(run.folder, folder),
                run.state,
                run.method,
                _progress(run),
                *numbers,
                _ago(run, now),
                run.cause or "–",
            )
        )
    widths = [max(len(shown(row[i])) for row in rows if not row[1].startswith("damaged:")) for i in range(len(_HEADS))]
    widths[0] = max(len(shown(row[0])) for row in rows)
    for row in rows:
        yield "  ".join(shown(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _progress(run: ListedRun) -> str:
    if run.progress is None or run.epochs is None:
        return "–"
    return f"{100 * run.progress:.0f} % of {run.epochs:.4g} epochs"


def _ago(run: ListedRun, now: float) -> str:
    if run.since is None:
        return "–"
    seconds = max(0.0, now - run.since)
    for unit_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
