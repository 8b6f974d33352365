"""Fan-out: the file is the truth; nothing else may end a run."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from clae_dist.config import Config, Tracking
from clae_dist.errors import ConfigError
from clae_dist.tracking import Tracker, Trackers, build_trackers, new_run_key
from tests import processes

NO_MLFLOW = Config(tracking=Tracking(name="none"))
TAGS = {"package_version": "0", "git_revision": "abc", "manifest_digest": "d"}


def build(config: Config, run_dir: Path, stream: Any) -> Trackers:
    return build_trackers(config, run_dir, new_run_key(), tags=TAGS, total_steps=10, resume_images_seen=0, stream=stream)


class Broken(Tracker):
    def log(self, metrics: Any, images_seen: int) -> None:
        raise OSError("the pipe is gone")


class Counting(Tracker):
    def __init__(self) -> None:
        self.logged = 0

    def log(self, metrics: Any, images_seen: int) -> None:
        self.logged += 1


def test_a_tracker_that_fails_is_named_once_and_switched_off() -> None:
    file, good, said = Counting(), Counting(), []
    trackers = Trackers(file, [Broken(), good], said.append)
    for step in range(3):
        trackers.log({"loss": 1.0}, step)
    trackers.close("finished")
    assert (file.logged, good.logged) == (3, 3)
    assert said == [
        "Broken failed in log (OSError: the pipe is gone) and is off for the rest of this run; metrics.jsonl is still written."
    ]


def test_a_metrics_file_that_fails_is_the_runs_failure() -> None:
    trackers = Trackers(Broken(), [Counting()], print)
    with pytest.raises(OSError, match="pipe is gone"):
        trackers.log({"loss": 1.0}, 1)


def test_without_mlflow_the_file_and_the_console_remain(tmp_path: Path) -> None:
    stream = io.StringIO()
    trackers: Tracker = build(NO_MLFLOW, tmp_path / "run", stream)
    trackers.log({"step": 1, "epoch": 0.1, "loss": 2.0}, 256)
    trackers.log_artifacts(tmp_path, "report")
    trackers.log_model(tmp_path, "d")
    trackers.close("finished")
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text())["images_seen"] == 256
    assert "loss 2.000" in stream.getvalue()


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "/tmp/mlruns"])
def test_a_folder_as_tracking_uri_is_refused_with_the_way_out(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri is .*sqlite:////path/to/mlflow\.db"):
        build(Config(tracking=Tracking(uri=uri)), tmp_path, io.StringIO())


WITHOUT_MLFLOW = """
import sys
sys.modules["mlflow"] = None  # as if it were not installed
from pathlib import Path
from clae_dist.errors import ConfigError
from clae_dist.config import Config, Tracking
from clae_dist.tracking import build_trackers, new_run_key

def build(name):
    config = Config(tracking=Tracking(name=name))
    rest = {"tags": {}, "total_steps": 1, "resume_images_seen": 0, "stream": sys.stdout}
    return build_trackers(config, Path(sys.argv[1]), new_run_key(), **rest)

trackers = build("none")
trackers.log({"step": 1, "loss": 1.0}, 2)
trackers.close("finished")
try:
    build("mlflow")
except ConfigError as error:
    print(error)
"""


@pytest.mark.slow
def test_tracking_none_works_where_mlflow_is_not_installed_and_mlflow_says_what_to_do(tmp_path: Path) -> None:
    done = processes.run(sys.executable, "-c", WITHOUT_MLFLOW, tmp_path, check=True)
    assert "step 1/1  loss 1.000" in done.stdout
    assert "mlflow is not installed; pip install 'mlflow>=3.5' psutil, or use tracking.name=none." in done.stdout
