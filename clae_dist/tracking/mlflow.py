"""MLflow as a store. Only the files mlflow*.py import mlflow (the vendor's package: imports here are absolute)."""

from __future__ import annotations

import importlib.util
import logging
import os
import shlex
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from clae_dist.config import Config
from clae_dist.config.sharing import shareable
from clae_dist.data.urls import uri_without_secrets
from clae_dist.errors import ConfigError
from clae_dist.keys import flatten
from clae_dist.runs.folder import CONFIG_FILE
from clae_dist.tracking.dataset import TrackedSet
from clae_dist.tracking.metric_groups import DESCRIPTION, grouped
from clae_dist.tracking.mlflow_model import write_model
from clae_dist.tracking.tracker import MetricsRow, Refused, Say, Status, brief

Item = TypeVar("Item")
RUN_KEY_TAG = "clae.run_key"
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
SERVER_DEFAULTS = {  # of mlflow's own variables, where the user set none
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds; mlflow's 120 would outlast a run's end
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # we try again ourselves, and say so
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a training run calls nobody but the server it was given
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def store_uri(config: Config, run_dir: Path) -> str:
    """Where runs are recorded: `tracking.uri`, else mlflow.db beside the run folder. Raises ConfigError."""
    uri = config.tracking.uri
    if not uri:
        return _sqlite_uri(run_dir.resolve().parent / "mlflow.db")
    scheme = urlsplit(uri).scheme
    if scheme in ("", "file") or uri == "sqlite:":
        raise ConfigError(
            f"tracking.uri is {uri!r}, which names a folder, and MLflow keeps runs in databases and servers only; "
            f"write sqlite:////path/to/mlflow.db or http://host:5000, or leave it empty."
        )
    database = _sqlite_file(uri)
    return _sqlite_uri(database.resolve()) if database else uri


def _sqlite_uri(database: Path) -> str:
    """Raises ConfigError for a path that means another one in a URL."""
    if odd := [letter for letter in "?%#" if letter in str(database)]:
        raise ConfigError(
            f"MLflow's database would be {str(database)!r}, where {odd[0]} has a meaning of its own in a URL; give a run_dir "
            "or a tracking.uri without it, or use tracking.name=none."
        )
    return f"sqlite:///{database}"


def page_command(uri: str) -> str:
    """The command that shows the runs, on this machine only, as is MLflow's default; the user adds the password."""
    shown = uri_without_secrets(uri)
    if urlsplit(uri).scheme in ("http", "https"):
        return shown
    return f"mlflow ui --backend-store-uri {shlex.quote(shown)}"


def require_mlflow() -> None:
    """Raises ConfigError unless mlflow is installed. Does not import it: that takes seconds and happens in the thread."""
    if importlib.util.find_spec("mlflow") is None:
        way_out = "pip install 'mlflow>=3.5' psutil, or use tracking.name=none"
        raise ConfigError(f"tracking.name is 'mlflow', but mlflow is not installed; {way_out}.")


def store_problem(uri: str, timeout_s: float = 5.0) -> str:
    """Why runs cannot be recorded at `uri` now, "" when they can. Changes nothing there."""
    database = _sqlite_file(uri)
    if database is not None:
        existing = next(path for path in (database, *database.parents) if path.exists())
        return "" if os.access(existing, os.W_OK) else f"{existing} is not writable"
    if urlsplit(uri).scheme not in ("http", "https"):
        return ""  # a database server: only its own client could tell
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout_s):
            return ""
    except OSError as error:
        return f"does not answer ({brief(error)})"


class MlflowStore:
    """A run in MLflow.

    `run_key` is our own name for the run, made before anything starts and kept in the run folder. It is a tag of the
    MLflow run, by which a continued run finds it again, whenever the process that made it was killed.
    MLflow keeps every value that it was ever sent: of what is trained again after a kill, it is sent what it does not have.
    The run's status is that of its training: a store that is not `training` only adds to the run and leaves it alone.
    `config_file` (the run's config.yaml) and `dataset` are shown on the run's page; a server that does not take them is named.
    """

    def __init__(
        self,
        uri: str,
        config: Config,
        run_name: str,
        run_key: str,
        tags: dict[str, str],
        say: Say,
        *,
        training: bool = True,
        trained: bool = False,
        config_file: Path | None = None,
        dataset: TrackedSet | None = None,
    ) -> None:
        assert run_key.isalnum(), f"run_key {run_key!r} goes into a query; letters and digits only"
        self.address = f"MLflow at {uri_without_secrets(uri)}"
        self.run_id = ""
        self.system_metrics_every_s = 10.0
        self._uri, self._run_name, self._run_key, self._say = uri, run_name, run_key, say
        self._training = self._ends_run = training
        self._trained = trained
        self._config_file, self._dataset = config_file, dataset
        self._experiment = config.tracking.experiment
        self._params = {key: str(value) for key, value in flatten(shareable(config)).items()}
        self._tags = {"method": config.method.name, "seed": str(config.seed), **tags, RUN_KEY_TAG: run_key}
        self._experiment_id = ""
        self._known: dict[str, set[int]] = {}  # what a continued run has: the images seen at each value, by metric
        self._client: Any = None
        self._monitor: Any = None

    def open(self) -> None:
        self._client = connect(self._uri)
        with refusals():
            self._experiment_id = find_experiment(self._client, self._uri, self._experiment)
            runs = self._client.search_runs([self._experiment_id], f"tags.`{RUN_KEY_TAG}` = '{self._run_key}'", max_results=1)
            if not runs:
                self._create()
            elif self._training:
                self._continue(runs[0])
            else:
                self.run_id = runs[0].info.run_id
                if self._trained:
                    self._learn_known(runs[0])
                    self._ends_run = runs[0].info.status != STATUS["finished"]
        self._show_settings_and_images()
        if self._training:
            self._start_monitor(resume=bool(runs))

    def log_rows(self, rows: list[MetricsRow]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(x), row.time_ms, row.images_seen)
            for row in rows
            for name, x in ((grouped(key), x) for key, x in row.metrics.items())
            if row.images_seen not in self._known.get(name, ())
        ]
        with refusals():
            for some in chunks(metrics, 1000):  # MLflow's limit a request
                self._client.log_batch(self.run_id, metrics=some, synchronous=True)

    def set_tag(self, name: str, text: str) -> None:
        """Set a tag of the run."""
        with refusals():
            self._set_tags({name: text})

    def log_artifacts(self, path: Path, name: str) -> None:
        with refusals():
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), name)
            else:
                self._client.log_artifact(self.run_id, str(path), name)

    def log_model(self, export_folder: Path, digest: str, images_seen: int) -> None:
        """A logged model made of the exported files and the code that serves them: weights and a config, nothing pickled.

        One is enough: nothing happens when the run has the same files after that many images already.
        """
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        files = " ".join(sorted(path.name for path in export_folder.iterdir()))
        facts = {"manifest_digest": digest, "images_seen": str(images_seen), "files": files}
        with refusals(), tempfile.TemporaryDirectory() as scratch:
            if self._has_model(images_seen, files):
                return
            model = self._client.create_logged_model(
                self._experiment_id, name="encoder", source_run_id=self.run_id, tags=facts, params=facts, model_type="encoder"
            )
            identity = {"artifact_path": model.artifact_location, "run_id": self.run_id, "model_uuid": model.model_id}
            write_model(export_folder, Path(scratch), **identity, metadata=facts)
            self._client.log_model_artifacts(model.model_id, str(export_folder))
            self._client.log_model_artifacts(model.model_id, scratch)
            self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, images_seen)])

    def _has_model(self, images_seen: int, files: str) -> bool:
        outputs = self._client.get_run(self.run_id).outputs
        there = [one.model_id for one in (outputs.model_outputs if outputs else ()) if one.step == images_seen]
        return any(self._client.get_logged_model(one).params.get("files", files) == files for one in there)

    def close(self, status: Status) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        if self._ends_run:
            with refusals():
                self._client.set_terminated(self.run_id, STATUS[status])

    def _create(self) -> None:
        self._ends_run = True  # a run that MLflow did not know (it was away while training) must not stay "RUNNING"
        # mlflow.* tags by hand: the client sets none, and the fluent API would look at the working folder for them.
        source = {"mlflow.source.name": "clae train", "mlflow.source.type": "LOCAL", "mlflow.note.content": DESCRIPTION}
        if revision := self._tags.get("git_revision"):
            source["mlflow.source.git.commit"] = revision
        run = self._client.create_run(self._experiment_id, tags={**self._tags, **source}, run_name=self._run_name)
        self.run_id = run.info.run_id
        self._log_params(self._params)

    def _show_settings_and_images(self) -> None:
        """config.yaml among the artifacts, and the images as the run's dataset. Both may be there already; metrics do not
        depend on them: an artifact store that is not set up, or a server without datasets, costs no metric."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        def show_config() -> None:
            path = self._config_file
            if path is not None and path.is_file() and not path.is_symlink():
                self._client.log_artifact(self.run_id, str(path))

        def show_images() -> None:
            if (images := self._dataset) is not None:
                shown = Dataset(images.name, images.digest, images.source_type, images.source, profile=images.profile)
                purpose = InputTag("mlflow.data.context", "training")
                self._client.log_inputs(self.run_id, [DatasetInput(shown, [purpose])])

        for what, action in ((CONFIG_FILE, show_config), ("the dataset", show_images)):
            try:
                action()
            except Exception as error:
                self._say(
                    f"{self.address} did not take {what} ({brief(error)}); it is in the run folder, and metrics are sent."
                )

    def _continue(self, run: Any) -> None:
        self._client.update_run(run.info.run_id, status="RUNNING")
        known = run.data.params
        self.run_id = run.info.run_id
        self._learn_known(run)
        self._log_params({key: value for key, value in self._params.items() if key not in known})
        # MLflow's parameters never change; what a continued run does otherwise (how often it logs, say) goes into tags.
        changed = [key for key, value in self._params.items() if known.get(key, _stored(value)) != _stored(value)]
        self._set_tags({**self._tags, **{f"continued.{key}": self._params[key] for key in changed}})

    def _learn_known(self, run: Any) -> None:
        ours = [key for key in run.data.metrics if not key.startswith("system/")]
        self._known = {key: {value.step for value in self._client.get_metric_history(self.run_id, key)} for key in ours}

    def _log_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        for some in chunks([Param(key, _stored(value)) for key, value in params.items()], 100):  # MLflow's limit a request
            self._client.log_batch(self.run_id, params=some, synchronous=True)

    def _set_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        for some in chunks([RunTag(key, _stored(value)) for key, value in tags.items()], 100):
            self._client.log_batch(self.run_id, tags=some, synchronous=True)

    def _start_monitor(self, resume: bool) -> None:
        if importlib.util.find_spec("psutil") is None:
            self._say("MLflow gets no system metrics: psutil is not installed (pip install psutil).")
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(
            self.run_id, sampling_interval=self.system_metrics_every_s, resume_logging=resume, tracking_uri=self._uri
        )
        self._monitor.start()


def connect(uri: str) -> Any:
    """A quiet MlflowClient of `uri`. Imports mlflow and, for a new sqlite file, makes its tables: seconds, both."""
    for name, value in SERVER_DEFAULTS.items():
        os.environ.setdefault(name, value)
    database = _sqlite_file(uri)
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
    try:
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise Refused(f"mlflow cannot be imported: {brief(error)}") from error
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with refusals():
        return MlflowClient(uri)


def find_experiment(client: Any, uri: str, name: str) -> str:
    """The id of the experiment, made where it is missing, with its artifacts beside an sqlite file and not in the cwd."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = _sqlite_file(uri)
        location = (database.parent / "mlartifacts" / name).as_uri() if database else None
        return str(client.create_experiment(name, artifact_location=location))
    if experiment.lifecycle_stage != "active":
        raise Refused(f"experiment {name!r} was deleted there; restore it or choose another tracking.experiment")
    return str(experiment.experiment_id)


@contextmanager
def refusals() -> Iterator[None]:
    """Turns the store's "your request is wrong" into Refused; everything else may pass on a later try."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        made_just_now = error.error_code == "RESOURCE_ALREADY_EXISTS"  # by another run that started with this one
        if not made_just_now and 400 <= error.get_http_status_code() < 500 and error.get_http_status_code() not in (408, 429):
            raise Refused(brief(error)) from error
        raise


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _stored(value: str) -> str:
    return value[:5000]  # MLflow's limits are 6000 for parameters and 8000 for tags


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None
