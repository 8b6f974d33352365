"""Methods learn: on real images, kNN accuracy rises above that of the untrained network by five points and more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep import demo
from tests import processes
from tests.processes import ROOT

SHARED = ROOT.parent / "shared" / "data"
STEPS = 110


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    demo.prepare_demo(
        folder / "shards", SHARED / "cifar10-train.tar.gz", folder / "cache", num_workers=0, say=lambda text: None
    )
    return folder / "shards"


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "cifar10-train.tar.gz").is_file(), reason="needs CIFAR-10 in ../shared/data")
@pytest.mark.parametrize(
    "method",
    [
        ["method.name=clae", "objective.name=hard"],
        ["method.name=clae", "objective.name=uel", "model.projector=linear", "model.projector_dim=128"],
        ["method.name=moco", "method.alpha=1", "method.queue=1280", "method.momentum=0.9"],
    ],
    ids=["clae-hard", "clae-uel", "clae-moco"],
)
def test_knn_rises_by_five_points(cifar: Path, tmp_path: Path, method: list[str]) -> None:
    epochs = STEPS * 128 / 50_000
    settings = ["model.norm=global", "launch.launcher=local", "launch.workers=1", "launch.device=cpu", "tracking.name=none"]
    length = [f"train.epochs={epochs}", f"train.knn_every={epochs}", "optim.warmup_epochs=0.03", "train.diagnose_every=1000"]
    places = [f"data.shards={cifar}", f"run_dir={tmp_path / 'run'}"]
    done = processes.clae("train", "quickstart", *places, *settings, *length, *method)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [line["knn_accuracy"] for line in lines if line.get("knn_accuracy") is not None]
    assert after >= before + 5, (before, after)
