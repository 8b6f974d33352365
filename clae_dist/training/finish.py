"""Evaluation, report and export of a finished run, each also sent to the run's tracker."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clae_dist import escape
from clae_dist.deploy.export import CONFIG, export_encoder
from clae_dist.evaluation.evaluate import evaluate_run
from clae_dist.evaluation.protocol import EvaluationProtocol, flat_metrics
from clae_dist.evaluation.stored import read_summary
from clae_dist.report.comparison import check_distinct, check_one_set
from clae_dist.report.record import summary_table
from clae_dist.report.run_page import write_report
from clae_dist.runs.claim import only_evaluation
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.trust import NOTHING, Permission, check_folder, open_run
from clae_dist.tracking import Tracker, continue_tracking

Say = Callable[[str], None]


def evaluate(
    run_dir: Path,
    say: Say = escape.say,
    shards: str = "",
    permission: Permission = NOTHING,
    suite: Sequence[EvaluationProtocol] | None = None,
) -> dict[str, Any]:
    """Run evaluate_run() under the evaluation lease and send its results to MLflow too."""
    with only_evaluation(run_dir, say):
        result = evaluate_run(run_dir, say, shards, permission, suite)
    with _tracker(run_dir, result["images_seen"], say, permission) as tracker:
        tracker.log(flat_metrics(result["results"]), result["images_seen"])
    return result


def report(
    run_dir: Path, compare: Sequence[Path] = (), say: Say = escape.say, shards: str = "", permission: Permission = NOTHING
) -> dict[str, Any]:
    """Write the report, log it to MLflow, and print the table beside those of the runs `compare`. Returns the summary.

    Raises ConfigError for a run that is named twice, one that has no report yet, and runs of different sets.
    """
    check_distinct([run_dir, *compare], "--compare")
    for path in compare:
        check_folder(path, permission)
    others = [read_summary(path) for path in compare]
    write_report(run_dir, say, shards, permission)
    summary = read_summary(run_dir)
    check_one_set([summary, *others])
    with _tracker(run_dir, summary["images_seen"] or 0, say, permission) as tracker:
        tracker.log_artifacts(RunFolder(run_dir).report, "report")
    for line in ["", *summary_table(summary, *others).split("\n")]:
        say(line)
    return summary


def export(run_dir: Path, destination: Path | None = None, say: Say = escape.say, permission: Permission = NOTHING) -> Path:
    """Export the encoder, and log it to MLflow as a model."""
    folder = export_encoder(run_dir, destination, permission)
    identity, description = RunFolder(run_dir).read_identity(), json.loads((folder / CONFIG).read_text())
    with _tracker(run_dir, description["images_seen"], say, permission) as tracker:
        tracker.log_model(folder, identity.manifest_digest)
    say(f"wrote {folder}; its README.md shows how to load it")
    problem = description["timm_problem"]
    loads = f'timm.create_model("local-dir:{folder}", pretrained=True) loads it'
    say(f"not in timm's own layout: {problem}" if problem else loads)
    return folder


@contextmanager
def _tracker(run_dir: Path, images_seen: int, say: Say, permission: Permission) -> Iterator[Tracker]:
    config, refusal = open_run(run_dir, permission).to_track()
    if refusal:
        say(refusal)
        yield Tracker()
        return
    identity = RunFolder(run_dir).read_identity()
    tracker = continue_tracking(config, run_dir, identity.run_key, tags=identity.tags, images_seen=images_seen, say=say)
    try:
        yield tracker
    finally:
        tracker.close("finished")
