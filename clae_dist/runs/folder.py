"""The layout of a run folder: the name of every file and folder in it, and readers that check what they read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clae_dist.config import Config
from clae_dist.errors import ConfigError
from clae_dist.reading import Check, MissingError, ReadError, expect, is_count, is_list_of, is_number, is_text, read_object
from clae_dist.recipe import from_yaml
from clae_dist.staging import shown_path

CONFIG_FILE = "config.yaml"
IDENTITY_FILE = "run.json"
STOP_FILE = "STOP"
METRICS_FILE = "metrics.jsonl"
GOODPUT_FILE = "goodput.jsonl"
ENDS_FILE, READMITTED_FILE = "ends.jsonl", "readmitted.json"
REGISTRY_FILE = "registry.jsonl"
HEARTBEAT_FILE = "heartbeat.json"
CONSOLE_FILE = "console.log"
EVALUATION_FILE = "evaluation.json"
SUMMARY_FILE = "summary.json"
BAD_SAMPLES_FILE = "bad-samples.jsonl"
TRAINING_LEASE, EVALUATION_LEASE = "training.lease", "evaluation.lease"
CHECKPOINTS, EVALUATION, EXPORT, HANG, INITIAL = "checkpoints", "evaluation", "export", "hang", "initial"
NONFINITE, PROFILE, PSEUDO_LABELS, RAY, REPORT = "nonfinite", "profile", "pseudo_labels", "ray", "report"
TENSORBOARD = "tensorboard"
REPORT_PAGE = "report.html"

FOLDERS = frozenset((CHECKPOINTS, EVALUATION, EXPORT, HANG, INITIAL, NONFINITE, PROFILE, PSEUDO_LABELS, RAY, REPORT))
FILES = frozenset(
    {CONFIG_FILE, IDENTITY_FILE, STOP_FILE, METRICS_FILE, GOODPUT_FILE, CONSOLE_FILE, EVALUATION_FILE, SUMMARY_FILE}
    | {BAD_SAMPLES_FILE, ENDS_FILE, READMITTED_FILE, REGISTRY_FILE, HEARTBEAT_FILE, TRAINING_LEASE, EVALUATION_LEASE}
)
PREFIXES = (".", "error-rank-")  # of temporary files and error logs of ranks

_CHECKPOINT = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Identity:
    """The content of run.json: the facts that make a run reproducible, besides its configuration."""

    package_version: str
    git_revision: str
    manifest_digest: str
    world_size: int
    backend: str
    collectives: str
    run_key: str
    started: float  # seconds since 1970, of the first start
    plugins: dict[str, str] = field(default_factory=dict)  # sha256 of the source of each method or objective from outside
    initial: dict[str, str] = field(default_factory=dict)  # source and digest of the weights of model.init
    pseudo_labels: dict[str, str] = field(default_factory=dict)  # source and digest of the encoder that clustered the images
    parent: dict[str, str] = field(default_factory=dict)  # run, run_key, step and checkpoint (sha256) that this run continues

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the run for trackers and exports."""
        return {
            "package_version": self.package_version,
            "git_revision": self.git_revision,
            "manifest_digest": self.manifest_digest,
            **{f"initial_weights_{name}": value for name, value in self.initial.items()},
            **{f"pseudo_labels_{name}": value for name, value in self.pseudo_labels.items()},
            **{f"parent_{name}": value for name, value in self.parent.items()},
        }


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and is_list_of(is_text)(list(value.values()))


_TEXTS = ("plugins", "initial", "pseudo_labels", "parent")  # missing in run.json of older versions


_FIELDS: dict[str, Check] = {
    **dict.fromkeys(("package_version", "git_revision", "manifest_digest", "backend", "collectives"), is_text),
    "run_key": lambda value: isinstance(value, str) and value.isalnum() and value.isascii(),
    "world_size": lambda value: is_count(value) and value > 0,
    "started": lambda value: is_number(value) and 0 <= value < 1e11,
    **dict.fromkeys(_TEXTS, _is_texts),
}


@dataclass(frozen=True)
class RunFolder:
    """Paths and checked content of the run folder at `path`. Paths are returned whether or not the file exists."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration, with the origin of each value as a comment."""
        return self.path / CONFIG_FILE

    @property
    def identity_file(self) -> Path:
        return self.path / IDENTITY_FILE

    @property
    def stop_file(self) -> Path:
        """Created by a launcher that cannot signal its ranks, to request a stop."""
        return self.path / STOP_FILE

    @property
    def metrics_file(self) -> Path:
        """One JSON object per logged step."""
        return self.path / METRICS_FILE

    @property
    def goodput_file(self) -> Path:
        return self.path / GOODPUT_FILE

    @property
    def ends_file(self) -> Path:
        """How each start ended, and why."""
        return self.path / ENDS_FILE

    @property
    def readmitted_file(self) -> Path:
        """Hosts that failed, and may be used again."""
        return self.path / READMITTED_FILE

    @property
    def heartbeat_file(self) -> Path:
        """Replaced every few seconds by rank 0 while it trains."""
        return self.path / HEARTBEAT_FILE

    @property
    def console_file(self) -> Path:
        """Console output of all ranks, over all starts."""
        return self.path / CONSOLE_FILE

    @property
    def registry_file(self) -> Path:
        """A line for each promotion of this run's export."""
        return self.path / REGISTRY_FILE

    @property
    def evaluation_file(self) -> Path:
        return self.path / EVALUATION_FILE

    @property
    def evaluation(self) -> Path:
        """Features and finished work of `clae evaluate`, from which an interrupted one continues; may be deleted."""
        return self.path / EVALUATION

    @property
    def summary_file(self) -> Path:
        return self.path / SUMMARY_FILE

    @property
    def bad_samples_file(self) -> Path:
        """One JSON object per undecodable image."""
        return self.path / BAD_SAMPLES_FILE

    @property
    def suspects_file(self) -> Path:
        """Labels that the run did not believe (method.name=noisy)."""
        return self.path / "suspects.jsonl"

    @property
    def training_lease(self) -> Path:
        return self.path / TRAINING_LEASE

    @property
    def evaluation_lease(self) -> Path:
        return self.path / EVALUATION_LEASE

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def export(self) -> Path:
        """The exported encoder, unless `clae export` is given another destination."""
        return self.path / EXPORT

    @property
    def initial(self) -> Path:
        """The weights that model.init named when the run began."""
        return self.path / INITIAL

    @property
    def initial_weights(self) -> Path:
        return self.initial / "encoder.safetensors"

    @property
    def initial_file(self) -> Path:
        """Their source, their digest, and the names of the tensors that were loaded and that were not."""
        return self.initial / "initial.json"

    @property
    def pseudo_labels(self) -> Path:
        """The clusters of the training images that the method's classifiers learn (method.pseudo_labels)."""
        return self.path / PSEUDO_LABELS

    @property
    def pseudo_label_table(self) -> Path:
        return self.pseudo_labels / "labels.safetensors"

    @property
    def pseudo_labels_file(self) -> Path:
        """Their source, its digest, and how the images were clustered."""
        return self.pseudo_labels / "pseudo_labels.json"

    @property
    def hang(self) -> Path:
        """Stack traces of the newest hang, written by the watchdogs of the ranks."""
        return self.path / HANG

    @property
    def ray(self) -> Path:
        """Working files of Ray; removed when the launcher ends."""
        return self.path / RAY

    @property
    def tensorboard(self) -> Path:
        """Event files of TensorBoard."""
        return self.path / TENSORBOARD

    @property
    def report(self) -> Path:
        return self.path / REPORT

    @property
    def report_page(self) -> Path:
        return self.report / REPORT_PAGE

    @property
    def profile(self) -> Path:
        """Traces of train.profile_steps."""
        return self.path / PROFILE

    def nonfinite(self, step: int) -> Path:
        """The record of a step with a non-finite loss or gradient, for `clae replay`."""
        return self.path / NONFINITE / f"step-{step:08d}"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def error_log(self, rank: int, source: str = "") -> Path:
        """The traceback of an error of one rank; `source` names the thread, "" is the main thread."""
        return self.path / f"error-rank-{rank}{source and '-' + source}.log"

    def find_checkpoints(self) -> list[Path]:
        """Committed checkpoints, newest first, including damaged ones."""
        if not self.checkpoints.is_dir():
            return []
        committed = [path for path in self.checkpoints.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
        return sorted(committed, key=step_of, reverse=True)

    def require(self) -> None:
        """Raise ConfigError if this is not a run folder."""
        if not self.config_file.is_file():
            raise self.missing()

    def missing(self) -> ConfigError:
        """The error for a folder that is not a run."""
        return ConfigError(
            f"RUN is {shown_path(self.path)!r}, which holds no {CONFIG_FILE}; name the folder of a run, such as runs/clae."
        )

    def read_config(self) -> Config:
        """The content of config.yaml. Raises ConfigError if this is not a run folder or the file is damaged."""
        self.require()
        return from_yaml(self.config_file)

    def read_identity(self) -> Identity:
        """The content of run.json. Raises ConfigError if it is missing or damaged."""
        try:
            content = read_object(self.identity_file, 1 << 20)
            content = {name: {} for name in _TEXTS} | content
            expect(content, _FIELDS)
        except MissingError:
            raise ConfigError(f"RUN is {str(self.path)!r}, which holds no {IDENTITY_FILE}; name the folder of a run.") from None
        except ReadError as error:
            raise ConfigError(
                f"{self.identity_file} is damaged ({error}); restore it from a copy, or delete it: the next `clae train` with "
                f"the settings of {CONFIG_FILE} writes a new one and resumes from the newest checkpoint."
            ) from None
        return Identity(**{key: content[key] for key in _FIELDS})


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step-"))
