"""Nested runs, asked back from a real MLflow store."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from clae_dist.config import Config, Tracking
from clae_dist.tracking import build_trackers
from clae_dist.tracking.nested import PARENT_TAG, Nested, record_nested

mlflow = pytest.importorskip("mlflow")


def test_children_are_nested_and_the_parent_is_updated(tmp_path: Path, mlflow_tables: Path) -> None:
    uri = f"sqlite:///{shutil.copy(mlflow_tables, tmp_path / 'mlflow.db')}"
    config = Config(tracking=Tracking(uri=uri))
    for key in ("child1", "child2"):
        trackers = build_trackers(
            config, tmp_path / key, key, tags={}, total_steps=1, resume_images_seen=0, stream=io.StringIO()
        )
        trackers.log({"loss": 1.0}, 10)
        trackers.close("finished")
    (tmp_path / "table.csv").write_text("a,b\n")
    nested = Nested("study", "studykey", ("child1",), {"clae/knn_mean": 40.0}, {"baseline": "simclr"}, (), finished=False)
    parent = record_nested(uri, "clae-dist", nested)
    client = mlflow.MlflowClient(uri)
    assert client.get_run(parent).info.status == "RUNNING"
    later = Nested(
        "study",
        "studykey",
        ("child1", "child2", "unknown"),
        {"clae/knn_mean": 41.0},
        {},
        (tmp_path / "table.csv",),
        finished=True,
    )
    assert record_nested(uri, "clae-dist", later) == parent  # the same run
    experiment = client.get_experiment_by_name("clae-dist")
    children = client.search_runs([experiment.experiment_id], f"tags.`{PARENT_TAG}` = '{parent}'")
    assert {run.data.tags["clae.run_key"] for run in children} == {"child1", "child2"}
    run = client.get_run(parent)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "study")
    assert (run.data.metrics["clae/knn_mean"], run.data.params["baseline"]) == (41.0, "simclr")
    assert [file.path for file in client.list_artifacts(parent, "study")] == ["study/table.csv"]
