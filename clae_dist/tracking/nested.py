"""A parent run in MLflow for a group of runs that were tracked on their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clae_dist.tracking.mlflow import RUN_KEY_TAG, STATUS, connect, find_experiment, refusals

PARENT_TAG = "mlflow.parentRunId"  # by which MLflow's page nests runs


@dataclass(frozen=True)
class Nested:
    """A parent run: `key` identifies it, `children` are the run keys of its children (run.json)."""

    name: str
    key: str
    children: tuple[str, ...]
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    files: tuple[Path, ...]
    finished: bool


def record_nested(uri: str, experiment: str, nested: Nested) -> str:
    """Create or update the parent run and make the children its own. Returns its id. Raises Refused and mlflow's errors."""
    client = connect(uri)
    with refusals():
        experiment_id = find_experiment(client, uri, experiment)
        parent = _find(client, experiment_id, nested.key)
        if parent is None:
            tags = {RUN_KEY_TAG: nested.key, "mlflow.source.name": "clae study", "mlflow.source.type": "LOCAL"}
            parent = client.create_run(experiment_id, tags=tags, run_name=nested.name)
            for key, text in nested.params.items():
                client.log_param(parent.info.run_id, key, text)
        run_id = str(parent.info.run_id)
        for key in nested.children:
            child = _find(client, experiment_id, key)
            if child is not None and child.data.tags.get(PARENT_TAG) != run_id:
                client.set_tag(child.info.run_id, PARENT_TAG, run_id)
        for name, value in nested.metrics.items():
            client.log_metric(run_id, name, value)
        for path in nested.files:
            client.log_artifact(run_id, str(path), "study")
        if nested.finished:
            client.set_terminated(run_id, STATUS["finished"])
        elif parent.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
    return run_id


def _find(client: Any, experiment_id: str, key: str) -> Any:
    assert key.isalnum(), f"{key!r} is used in a query; letters and digits only"
    runs = client.search_runs([experiment_id], f"tags.`{RUN_KEY_TAG}` = '{key}'", max_results=1)
    return runs[0] if runs else None
