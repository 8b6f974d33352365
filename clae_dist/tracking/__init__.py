"""Trackers of metrics, artifacts and encoder: the run folder, the console, MLflow, TensorBoard."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from clae_dist import escape
from clae_dist.config import Config
from clae_dist.runs.folder import RunFolder
from clae_dist.tracking.console import ConsoleTracker
from clae_dist.tracking.dataset import TrackedSet
from clae_dist.tracking.files import MetricsFile, MetricsRows
from clae_dist.tracking.tracker import MetricsRow, Say, Status, Tracker, Trackers

__all__ = [
    "MetricsFile",
    "Status",
    "TrackedSet",
    "Tracker",
    "Trackers",
    "build_trackers",
    "continue_tracking",
    "check_tracking",
    "new_run_key",
]


def new_run_key() -> str:
    """A key for a new run, kept in run.json, by which a resumed run finds its MLflow run."""
    return uuid.uuid4().hex


def check_tracking(config: Config, run_dir: Path) -> None:
    """Raise ConfigError for tracking that cannot work on this machine; changes nothing and contacts no server."""
    if config.tracking.uses("mlflow"):
        from clae_dist.tracking import mlflow

        mlflow.require_mlflow()
        mlflow.store_uri(config, run_dir)
    if config.tracking.uses("tensorboard"):
        from clae_dist.tracking.tensorboard import require_tensorboard

        require_tensorboard()


def continue_tracking(
    config: Config,
    run_dir: Path,
    run_key: str,
    *,
    tags: dict[str, str],
    images_seen: int,
    say: Say,
    trained: bool = False,
    dataset: TrackedSet | None = None,
) -> Tracker:
    """A tracker that adds results, a report or a model to a run during or after its training. Raises ConfigError.

    The status of the run in the store does not change.

    Args:
        trained: the run has been trained to its end; metrics and a status that could not be sent then are sent now.
    """
    check_tracking(config, run_dir)
    others: list[Tracker] = []
    if config.tracking.uses("tensorboard"):
        from clae_dist.tracking.tensorboard import ResultsTracker

        others.append(ResultsTracker(RunFolder(run_dir).tensorboard))
    if not config.tracking.uses("mlflow"):
        return Trackers(Tracker(), others, say)
    rows = MetricsRows(RunFolder(run_dir).metrics_file) if trained else ()
    more: dict[str, Any] = {"tags": tags, "training": False, "trained": trained, "dataset": dataset}
    sender = _mlflow(config, run_dir, run_key, say, images_seen=images_seen, rows=rows, **more)[0]
    return Trackers(Tracker(), [sender, *others], say) if others else sender


def build_trackers(
    config: Config,
    run_dir: Path,
    run_key: str,
    *,
    tags: dict[str, str],
    total_steps: int,
    resume_images_seen: int,
    stream: IO[str],
    dataset: TrackedSet | None = None,
    more: Sequence[Tracker] = (),
) -> Trackers:
    """The trackers of rank 0; other ranks use a plain Tracker. Building them again resumes the same run.

    Args:
        tags: package_version, git_revision and manifest_digest.
        resume_images_seen: that of the checkpoint, 0 for a new run.
        stream: the console.
        dataset: the training images.
        more: trackers of the caller.

    Raises: ConfigError for tracking that cannot work on this machine.
    """

    check_tracking(config, run_dir)

    def say(text: str) -> None:
        escape.say(text, file=stream, flush=True)

    run_dir.mkdir(parents=True, exist_ok=True)
    file = MetricsFile(RunFolder(run_dir).metrics_file, resume_images_seen, say)
    others: list[Tracker] = [ConsoleTracker(stream, total_steps, config.batch.global_size), *more]
    page = ""
    if config.tracking.uses("tensorboard"):
        from clae_dist.tracking.tensorboard import TensorBoardTracker

        others.append(TensorBoardTracker(RunFolder(run_dir).tensorboard, resume_images_seen))
    if config.tracking.uses("mlflow"):
        about: dict[str, Any] = {"tags": tags, "dataset": dataset}
        # A killed process may not have sent all lines of the file.
        tracker, page = _mlflow(config, run_dir, run_key, say, images_seen=resume_images_seen, rows=file.rows(), **about)
        others.append(tracker)
    return Trackers(file, others, say, page)


def _mlflow(
    config: Config,
    run_dir: Path,
    run_key: str,
    say: Say,
    *,
    images_seen: int,
    rows: Sequence[MetricsRow] | MetricsRows,
    **more: Any,
) -> tuple[Tracker, str]:
    """A tracker that sends to MLflow (`more`: see MlflowStore), and the command that opens its page."""
    from clae_dist.tracking import mlflow
    from clae_dist.tracking.background import BackgroundTracker

    uri, config_file = mlflow.store_uri(config, run_dir), RunFolder(run_dir).config_file
    store = mlflow.MlflowStore(uri, config, run_dir.resolve().name, run_key, say=say, config_file=config_file, **more)
    return BackgroundTracker(store, say, images_seen=images_seen, rows=rows), mlflow.page_command(uri)
