"""MLflow's page of a run: the images, grouped metrics, config.yaml, what a step is; and MLflow's limits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clae_dist.config import Config, Data, Tracking
from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.recipe import to_yaml
from clae_dist.report.curves import CHARTS
from clae_dist.runs.goodput import Goodput
from clae_dist.tracking import TrackedSet, build_trackers, continue_tracking, new_run_key
from clae_dist.tracking.metric_groups import _GROUP_OF, grouped
from clae_dist.tracking.mlflow import MlflowStore, refusals
from clae_dist.tracking.tracker import MetricsRow, Refused

mlflow = pytest.importorskip("mlflow")
TAGS = {"package_version": "0.1.0", "git_revision": "0123abcd", "manifest_digest": "sha256:feed"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("data") / "shards", 40, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, mlflow_tables: Path) -> Path:
    """One store for the module."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(mlflow_tables, folder / "mlflow.db")
    return folder


def config_of(folder: Path, shards: str, **settings: Any) -> Config:
    return Config(
        run_dir=str(folder),
        data=Data(shards=shards),
        tracking=Tracking(uri=f"sqlite:///{folder.parent / 'mlflow.db'}"),
        **settings,
    )


def client_of(folder: Path) -> Any:
    return mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def run_of(client: Any, run_key: str) -> Any:
    experiment = client.get_experiment_by_name("clae-dist")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`clae.run_key` = '{run_key}'")
    return run


def test_the_page_of_a_run(folder: Path, manifest: Manifest) -> None:
    run_dir, run_key, said = folder / "first", new_run_key(), list[str]()
    run_dir.mkdir()
    shards = "https://me:canary@host/images?sig=canary"
    config = config_of(run_dir, shards)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    images = TrackedSet.of(manifest, config)

    class Stream:
        def write(self, text: str) -> int:
            said.append(text)
            return len(text)

        def flush(self) -> None: ...

    def train(step: int, seen: int) -> None:
        trackers = build_trackers(
            config,
            run_dir,
            run_key,
            tags=TAGS,
            total_steps=9,
            resume_images_seen=seen,
            stream=Stream(),
            dataset=images,  # type: ignore[arg-type]
        )
        trackers.log({"step": step, "loss": 3.0, "images_per_s": 100.0, "cos_positive": 0.5}, 256 * step)
        trackers.log({"step": step, "knn_accuracy": 40.0}, 256 * step)
        trackers.close("finished")

    train(1, 0)
    train(2, 256)  # continued: nothing is there twice
    later = continue_tracking(config, run_dir, run_key, tags=TAGS, images_seen=512, say=said.append)
    later.log({"knn_accuracy_after": 41.0}, 512)
    later.close("finished")
    assert not any("did not take" in line or "unreachable" in line for line in said), said

    client = client_of(folder)
    run = run_of(client, run_key)
    names = {name for name in run.data.metrics if not name.startswith("system/")}
    assert names == {
        *("train/step", "train/loss", "speed/images_per_s", "embedding/cos_positive"),
        *("eval/knn_accuracy", "eval/knn_accuracy_after"),
    }
    assert [one.step for one in client.get_metric_history(run.info.run_id, "train/loss")] == [256, 512]
    assert "number of images" in run.data.tags["mlflow.note.content"]
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
    stored = client.download_artifacts(run.info.run_id, "config.yaml")
    assert Path(stored).read_text() == (run_dir / "config.yaml").read_text()
    (shown,) = run.inputs.dataset_inputs
    assert (shown.dataset.name, shown.dataset.digest) == (manifest.name, manifest.digest[:36])
    assert {tag.key: tag.value for tag in shown.tags} == {"mlflow.data.context": "training"}
    assert (shown.dataset.source_type, json.loads(shown.dataset.source)) == ("https", {"url": "https://host/images?…"})
    profile = json.loads(shown.dataset.profile)
    assert profile["images"] == {split: manifest.num_samples(split) for split in manifest.splits}
    assert (profile["manifest_digest"], profile["licence"]) == (manifest.digest, manifest.licence)


@pytest.mark.parametrize(
    ("shards", "kind", "where"),
    [
        ("/data/set", "local", {"uri": "/data/set"}),
        ("s3://bucket/set/x-{000..002}.tar", "s3", {"uri": "s3://bucket/set/x-{000..002}.tar"}),
        ("pipe:TOKEN=canary curl u", "pipe", {"uri": "pipe:curl ?…"}),
    ],
)
def test_a_dataset_says_where_its_images_are_without_secrets(
    manifest: Manifest, shards: str, kind: str, where: dict[str, str]
) -> None:
    found = TrackedSet.of(manifest, Config(data=Data(shards=shards)))
    assert (found.source_type, json.loads(found.source)) == (kind, where)
    mixed = TrackedSet.of(manifest, Config(data=Data(shards=shards, mixture={"https://u:canary@h/x": 0.5})))
    assert json.loads(mixed.source) == {**where, "mixture": {"https://h/x": 0.5}}


def test_every_metric_that_is_drawn_or_booked_has_a_group() -> None:
    curves = [curve for chart in CHARTS for curve in (*chart.curves, *chart.otherwise)]
    keys = {key for curve in curves for key in (curve.key, curve.step_key) if key} | set(
        Goodput(dict.fromkeys(_kinds(), 1.0), 1).metrics()
    )
    assert keys <= set(_GROUP_OF)
    assert grouped("loss") == "train/loss"
    assert grouped("a metric of tomorrow") == "train/a metric of tomorrow"


def _kinds() -> Any:
    from clae_dist.runs.goodput import KINDS

    return KINDS


def opened(folder: Path, config: Config, run_key: str, said: list[str], **settings: Any) -> MlflowStore:
    store = MlflowStore(config.tracking.uri, config, "run", run_key, TAGS, said.append, **settings)
    store.system_metrics_every_s = 1000.0
    store.open()
    return store


def test_a_store_without_artifacts_or_datasets_costs_no_metric(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Artifacts go to a bucket that this machine cannot reach, and the server is older than datasets: both are said once."""
    run_key, said = new_run_key(), list[str]()
    config = config_of(folder / "second", "/data/set")
    (folder / "second").mkdir()
    (folder / "second/config.yaml").write_text(to_yaml(config))

    def broken(*arguments: Any, **settings: Any) -> None:
        raise ModuleNotFoundError("No module named 'boto3'")

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", broken)
    monkeypatch.setattr(mlflow.MlflowClient, "log_inputs", broken)
    shown = {"config_file": folder / "second/config.yaml", "dataset": TrackedSet.of(manifest, config)}
    store = opened(folder, config, run_key, said, **shown)
    store.log_rows([MetricsRow({"loss": 1.0}, 256, 1)])
    store.close("finished")
    assert [line.split(" did not take ")[1].split(" (")[0] for line in said] == ["config.yaml", "the dataset"]
    assert run_of(client_of(folder), run_key).data.metrics["train/loss"] == 1.0


def test_a_link_is_not_followed_to_another_file(folder: Path) -> None:
    run_dir, run_key, said = folder / "link", new_run_key(), list[str]()
    run_dir.mkdir()
    (folder / "private").write_text("canary")
    (run_dir / "config.yaml").symlink_to(folder / "private")
    store = opened(folder, config_of(run_dir, "/data/set"), run_key, said, config_file=run_dir / "config.yaml")
    store.close("finished")
    assert client_of(folder).list_artifacts(run_of(client_of(folder), run_key).info.run_id) == []


def test_more_metrics_than_mlflow_takes_at_once(folder: Path) -> None:
    """100 rows of 15 metrics: a request takes 1,000."""
    run_key, said = new_run_key(), list[str]()
    store = opened(folder, config_of(folder / "many", "/data/set"), run_key, said)
    store.log_rows([MetricsRow({f"m{i}": float(step) for i in range(15)}, step, step) for step in range(1, 101)])
    store.close("finished")
    client = client_of(folder)
    run = run_of(client, run_key)
    for name in ("train/m0", "train/m14"):
        assert [one.value for one in client.get_metric_history(run.info.run_id, name)] == [float(i) for i in range(1, 101)]


def test_a_long_value_is_cut_and_no_change_when_the_run_is_continued(folder: Path) -> None:
    run_key, said = new_run_key(), list[str]()
    config = config_of(folder / "long", "/data/" + "x" * 9000)
    for _ in range(2):
        opened(folder, config, run_key, said).close("stopped")
    run = run_of(client_of(folder), run_key)
    assert run.data.params["data.shards"] == config.data.shards[:5000]
    assert not any(name.startswith("continued.") for name in run.data.tags)
    changed = replace(config, data=Data(shards="/data/" + "y" * 9000))
    opened(folder, changed, run_key, said).close("stopped")
    run = run_of(client_of(folder), run_key)
    assert run.data.tags["continued.data.shards"] == changed.data.shards[:5000]


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("INVALID_PARAMETER_VALUE", True),
        ("PERMISSION_DENIED", True),
        ("REQUEST_LIMIT_EXCEEDED", False),  # 429: too many requests now
        ("RESOURCE_EXHAUSTED", False),
        ("RESOURCE_ALREADY_EXISTS", False),
        ("TEMPORARILY_UNAVAILABLE", False),
        ("INTERNAL_ERROR", False),
    ],
)
def test_a_busy_server_is_asked_again(code: str, refused: bool) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    with pytest.raises(Refused if refused else MlflowException), refusals():
        raise MlflowException("no", error_code=ErrorCode.Value(code))


def test_a_continued_run_is_running_until_it_ends(folder: Path) -> None:
    run_key, said, config = new_run_key(), list[str](), config_of(folder / "again", "/data/set")

    def status() -> str:
        return str(run_of(client_of(folder), run_key).info.status)

    opened(folder, config, run_key, said).close("stopped")
    assert status() == "KILLED"
    store = opened(folder, config, run_key, said)
    assert status() == "RUNNING"
    store.close("finished")
    assert status() == "FINISHED"
