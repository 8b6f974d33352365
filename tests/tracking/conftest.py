from __future__ import annotations

import fcntl
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A database of MLflow with its tables and nothing in them, to be copied: making them takes seconds.

    It is made once for all workers of a session. The store of test_mlflow.py and that of the main job are made by us.
    """
    import mlflow

    base = tmp_path_factory.getbasetemp()
    path = (base if worker_id == "master" else base.parent) / "mlflow-tables.db"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            mlflow.MlflowClient(f"sqlite:///{unfinished}").search_experiments()
            unfinished.rename(path)
    return path
