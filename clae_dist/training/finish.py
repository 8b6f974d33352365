"""Evaluation, report and export of a finished run, each also sent to the run's tracker."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clae_dist import escape
from clae_dist.deploy.examined import examined
from clae_dist.deploy.export import export_encoder
from clae_dist.deploy.int8_table import int8_summary
from clae_dist.deploy.layout import CONFIG, GRAPH, INT8_GRAPH, INT8_REPORT, Contents
from clae_dist.devices import Request as Device
from clae_dist.evaluation.evaluate import evaluate as evaluate_all
from clae_dist.evaluation.protocol import flat_metrics
from clae_dist.evaluation.stored import read_summary
from clae_dist.evaluation.suite import DEFAULT, make_suite, split_overrides
from clae_dist.report.comparison import check_distinct, check_one_set
from clae_dist.report.record import summary_table
from clae_dist.report.run_page import write_report
from clae_dist.runs.claim import only_evaluation
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.trust import NOTHING, Permission, check_folder, open_run
from clae_dist.tracking import Tracker, continue_tracking
from clae_dist.world import World

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """The arguments of `clae evaluate`, for every rank; see deploy/examined.py for the first five."""

    subject: str
    shards: str = ""
    to: str = ""
    overrides: tuple[str, ...] = ()  # of settings of evaluation, images and protocols
    permission: Permission = NOTHING
    suite: str = ",".join(DEFAULT)
    fresh: bool = False
    device: Device = "auto"
    threads: int = 0  # of torch for each rank; 0: its share of the cores


def evaluate(request: Request, world: World | None = None, say: Say = escape.say) -> dict[str, Any]:
    """Evaluate under the evaluation lease of the folder that gets the results; those of a run go to its tracker, too.

    Collective. Raises ConfigError, DataError and StorageError.
    """
    world = world or World.single()
    own, others = split_overrides(request.overrides)
    suite = make_suite(request.suite, own)
    found = examined(request.subject, request.shards, request.to, others, request.permission)
    with only_evaluation(found.folder, world, say):
        result = evaluate_all(found, suite, world, say, fresh=request.fresh)
    is_run = found.folder == Path(request.subject).expanduser() and RunFolder(found.folder).config_file.exists()
    if is_run and world.is_main:
        with _tracker(found.folder, result["images_seen"], say, request.permission) as tracker:
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


def export(
    run_dir: Path,
    destination: Path | None = None,
    say: Say = escape.say,
    permission: Permission = NOTHING,
    contents: Contents = Contents(),  # noqa: B008 - frozen
    shards: str = "",
) -> Path:
    """Export the encoder, and log it to MLflow as a model; arguments as in `export_encoder`."""
    folder = export_encoder(run_dir, destination, permission, contents, shards, say)
    identity, description = RunFolder(run_dir).read_identity(), json.loads((folder / CONFIG).read_text())
    with _tracker(run_dir, description["images_seen"], say, permission) as tracker:
        tracker.log_model(folder, identity.manifest_digest)
    say(f"wrote {folder}; its README.md shows how to load it")
    problem = description["timm_problem"]
    loads = f'timm.create_model("local-dir:{folder}", pretrained=True) loads it'
    if not problem:
        say(loads)
    elif "timm" in contents.formats:
        say(f"not in timm's own layout: {problem}")
    if onnx := description.get("onnx"):
        say(f"{GRAPH}: features differ from torch's by at most {onnx['difference']:.1e} ({onnx['compared_on']})")
    if "onnx-int8" in contents.formats:
        say(f"{INT8_GRAPH}: {int8_summary(json.loads((folder / INT8_REPORT).read_text()))}")
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
