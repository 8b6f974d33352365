"""The main job, as a user starts it: ./launch/quickstart.sh, from images to a report."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import processes
from tests.processes import ROOT

SHARED = ROOT.parent / "shared" / "data"


def quickstart(*arguments: str) -> str:
    """What the script says; it must end well."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MLFLOW_TRACKING_URI", "CLAE_DATA")}
    with processes.started(ROOT / "launch" / "quickstart.sh", *arguments, env=environment) as process:
        code, output = processes.finish(process, timeout_s=3000)
    assert code == 0, output
    return output


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Squares of noise whose colour tells their class."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("blue", "green", "red")):
        for split, count in (("train", 160), ("test", 40)):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (40, 40, 3), dtype=np.uint8)
                pixels[:, :, number] += 90
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.jpg")
    return tmp_path / "images"


@pytest.mark.slow
def test_the_whole_job_on_a_small_budget(images: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    small = ["train.epochs=1", "optim.warmup_epochs=0", "train.log_every=2", "train.diagnose_every=3"]
    said = quickstart("--data", str(images), "--run-dir", str(run_dir), *small)

    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["backend"] == "ddp"
    assert summary["images_seen"] > 0
    assert summary["images_per_s"] > 0
    assert summary["wall_s"] > 0
    assert np.isfinite(summary["loss"])
    for protocol in ("knn", "linear"):
        assert all(0 < accuracy <= 100 for accuracy in summary["results"][protocol]["accuracy"].values())

    assert "ray: 2 workers" in said
    assert "on the global batch's negatives" in said
    assert "mlflow ui --backend-store-uri sqlite:///" in said
    assert "kNN" in said.rsplit("== Report", 1)[1]
    assert "<html" in (run_dir / "report" / "report.html").read_text()
    assert list((run_dir / "export").glob("*.safetensors"))
    assert list((run_dir / "checkpoints").glob("step-*/checkpoint.json"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert any("wrong_sign_share" in line for line in lines)

    question = """
import sys, json
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
print(json.dumps({r.info.run_name: [r.info.status, sorted(r.data.metrics), r.data.params.get("batch.global_size"),
    [a.path for a in client.list_artifacts(r.info.run_id)], r.data.tags.get("manifest_digest", "")] for r in runs}))
"""
    store = f"sqlite:///{run_dir}/mlflow.db"
    answer = processes.run(sys.executable, "-W", "ignore", "-c", question, store, check=True)
    runs = json.loads(answer.stdout.splitlines()[-1])
    assert set(runs) == {"run"}
    status, metrics, batch, artifacts, digest = runs["run"]
    assert status == "FINISHED"
    assert {"train/loss", "eval/knn_accuracy_after", "attack/wrong_sign_share"} <= set(metrics)
    assert int(batch) > 0
    assert {"report", "config.yaml"} <= set(artifacts)
    assert digest == summary["manifest_digest"]


needs_cifar = pytest.mark.skipif(not (SHARED / "cifar10-train.tar.gz").is_file(), reason="needs CIFAR-10 in ../shared/data")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@needs_cifar
def test_the_quickstart_teaches_the_encoder_something(tmp_path: Path) -> None:
    """Ten points of kNN over the encoder's own random initialisation, on all of CIFAR-10's test split."""
    run_dir = tmp_path / "run"
    quickstart("--run-dir", str(run_dir), "train.epochs=0.28")  # as many images on every machine
    summary = json.loads((run_dir / "summary.json").read_text())
    knn, linear = (summary["results"][protocol]["accuracy"] for protocol in ("knn", "linear"))
    assert knn["after"] - knn["before"] >= 10
    assert linear["after"] > linear["before"]
    again = quickstart("--run-dir", str(run_dir))  # which keeps the length that the run has
    assert "this run is finished already" in again
    assert json.loads((run_dir / "summary.json").read_text())["results"] == summary["results"]


@pytest.mark.long
@pytest.mark.timeout(3000)
@needs_cifar
def test_simclr_beside_the_quickstart(tmp_path: Path) -> None:
    """The baseline sees more images: as many as cost the same."""
    run_dir = tmp_path / "run"
    said = quickstart("--run-dir", str(run_dir), "--compare", "simclr", "--minutes", "2")
    summary, simclr = (json.loads((folder / "summary.json").read_text()) for folder in (run_dir, run_dir / "simclr"))
    assert simclr["images_seen"] == pytest.approx(summary["images_seen"] * 11 / 6, rel=0.01)
    assert f"{simclr['results']['knn']['accuracy']['after']:.1f} %" in said.rsplit("== Report", 1)[1]
