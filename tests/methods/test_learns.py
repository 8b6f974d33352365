"""Methods learn: on real images, kNN accuracy rises by five points and more above that of the untrained network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep import demo
from tests import processes

STEPS, BATCH = 110, 128
WITHOUT_CIFAR = pytest.mark.skipif(not demo.FOUND_CIFAR.is_file(), reason=f"CIFAR-10 is not at {demo.FOUND_CIFAR}")
METHODS = {
    "simclr": ["method.name=simclr"],
    "clae": ["method.name=clae"],
    "moco": ["method.name=moco", "method.queue=0", "method.momentum=0.5", "model.projector=mlp_bn"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    demo.prepare_demo(folder / "shards", None, folder / "cache", num_workers=2, say=lambda text: None)
    return folder / "shards"


def knn_accuracies(run_dir: Path) -> list[float]:
    """kNN accuracy at the start of a run, and whenever it was computed since."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["knn_accuracy"] for line in lines if line.get("knn_accuracy") is not None]


@pytest.mark.slow
@WITHOUT_CIFAR
@pytest.mark.parametrize("name", METHODS)
def test_knn_accuracy_rises_by_five_points(shards: Path, tmp_path: Path, name: str) -> None:
    epochs = STEPS * BATCH / 50_000
    length = [f"train.epochs={epochs}", f"train.knn_every={epochs}", "optim.warmup_epochs=0.03", "train.diagnose_every=1000"]
    places = [f"data.shards={shards}", f"run_dir={tmp_path / 'run'}", "launch.launcher=local", "launch.workers=1"]
    more = ["model.norm=global", "launch.device=cpu", "tracking.name=none"]
    done = processes.clae("train", "quickstart", *places, *length, *more, *METHODS[name], timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    before, *_, after = knn_accuracies(tmp_path / "run")
    assert after >= before + 5, (before, after)
