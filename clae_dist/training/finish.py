"""What comes after training: evaluation, report and export, each told to the run's tracker, too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clae_dist.config import ConfigError
from clae_dist.evaluation.evaluate import evaluate_run
from clae_dist.evaluation.export import export_encoder
from clae_dist.evaluation.record import read_record, summary_table
from clae_dist.evaluation.report import write_report
from clae_dist.runs.folder import read_identity
from clae_dist.runs.in_use import only_evaluation
from clae_dist.tracking import Tracker, continue_tracking

Say = Callable[[str], None]


def evaluate(run_dir: Path, say: Say = print, shards: str = "") -> dict[str, Any]:
    """evaluate_run(), its accuracies also in MLflow. `shards` is where the images are now, if not where config.yaml says."""
    with only_evaluation(run_dir, say):
        result = evaluate_run(run_dir, say, shards)
    accuracies = {
        key: result[key] for key in ("knn_before", "knn_after", "linear_before", "linear_after") if result[key] is not None
    }
    with _tracker(run_dir, result["images_seen"], say) as tracker:
        tracker.log(accuracies, result["images_seen"])
    return result


def report(run_dir: Path, compare: Path | None = None, say: Say = print, shards: str = "") -> dict[str, Any]:
    """write_report(), the report also in MLflow; says the table, beside that of the run `compare`. Returns the summary."""
    other = read_summary(compare) if compare else None
    write_report(run_dir, say, shards)
    summary = read_summary(run_dir)
    with _tracker(run_dir, summary["images_seen"] or 0, say) as tracker:
        tracker.log_artifacts(run_dir / "report", "report")
    say("\n" + summary_table(summary, other))
    return summary


def export(run_dir: Path, destination: Path | None = None, say: Say = print) -> Path:
    """export_encoder(), the encoder also in MLflow, as a logged model."""
    folder = export_encoder(run_dir, destination)
    identity, seen = read_identity(run_dir), json.loads((folder / "config.json").read_text())["images_seen"]
    with _tracker(run_dir, seen, say) as tracker:
        tracker.log_model(folder, identity.manifest_digest)
    say(f"wrote {folder}; its README.md shows how to load it")
    return folder


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json of a run. Raises ConfigError when it has no report yet."""
    try:
        summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"RUN is {str(run_dir)!r}, whose summary.json cannot be read ({error}); `clae report` writes it."
        ) from None
    return summary


@contextmanager
def _tracker(run_dir: Path, images_seen: int, say: Say) -> Iterator[Tracker]:
    config, identity = read_record(run_dir).config, read_identity(run_dir)
    tracker = continue_tracking(config, run_dir, identity.run_key, tags=identity.tags, images_seen=images_seen, say=say)
    try:
        yield tracker
    finally:
        tracker.close("finished")
