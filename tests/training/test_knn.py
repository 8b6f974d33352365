"""kNN accuracy while training, of sets whose labels are not what one hopes for."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from clae_dist.config import Train
from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.manifest import Manifest, write_manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.evaluation.features import extract
from clae_dist.evaluation.linear import linear_probe
from clae_dist.files import file_sha256
from clae_dist.models import build_model
from clae_dist.training import knn
from clae_dist.training.knn import knn_while_training
from clae_dist.training.session import Session
from clae_dist.world import World
from tests.small_run import small_run


def relabelled(folder: Path, labels: dict[int, int]) -> Manifest:
    """Noise images in two splits of 20, of which those of the numbers in `labels` have another label."""
    manifest = write_synthetic_set(folder, 20, 16)
    splits = {}
    for split, (shard,) in manifest.splits.items():
        rows = manifest.index(shard).copy()
        for number, label in labels.items():
            rows[number, 2] = label
        np.save(folder / shard.index_name, rows)
        splits[split] = (replace(shard, index_sha256=file_sha256(folder / shard.index_name)),)
    about: dict[str, Any] = {"name": "noise", "source": "", "licence": "", "quarantined": 0, "preparation": {}}
    return write_manifest(folder, classes=manifest.classes, splits=splits, **about)


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        ({0: -1}, "kNN: images of train without a label, skipped in the accuracies: 1 of 20"),
        (dict.fromkeys(range(20), 1), "no kNN accuracy: all labelled images of train are of one class"),
        (dict.fromkeys(range(20), -1), "no kNN accuracy: no image of train has a label"),
    ],
)
def test_a_run_with_odd_labels_trains(tmp_path: Path, labels: dict[int, int], line: str) -> None:
    """One image without a label made `train` refuse to start."""
    manifest = relabelled(tmp_path / "shards", labels)
    config, said = small_run(manifest.folder, tmp_path / "run"), list[str]()
    model = build_model(config)
    backend: Any = SimpleNamespace(average_local_statistics=lambda: None, full_model=lambda: nullcontext(model))
    found = knn_while_training(Session(config, World.single("cpu"), said.append), backend, manifest)
    assert ("knn_accuracy" in found, bool(found)) == (len(labels) == 1, len(labels) == 1)
    assert line in "\n".join(said)


@pytest.mark.parametrize("features", ["encoder", "projection"])
def test_the_features_of_the_knn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: Literal["encoder", "projection"]
) -> None:
    """The paper's code for instance discrimination and UEL takes the embeddings; clean route, running statistics."""
    manifest = write_synthetic_set(tmp_path / "shards", 20, 16)
    config = small_run(manifest.folder, tmp_path / "run", train=Train(knn_features=features))
    model = build_model(config).train()
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(knn, "knn_accuracy", lambda bank, queries, *rest: seen.append(queries.features_NF) or 50.0)
    backend: Any = SimpleNamespace(average_local_statistics=lambda: None, full_model=lambda: nullcontext(model))
    assert knn_while_training(Session(config, World.single("cpu"), pytest.fail), backend, manifest)
    assert model.training
    ((pixels, *_),) = EvaluationSet(manifest, "test", 16, 0).batches(100)
    images = torch.as_tensor(pixels) / 255
    model.eval()
    with torch.no_grad():
        wanted = model.features(images) if features == "encoder" else model(images)
    torch.testing.assert_close(seen[0], wanted)


def test_a_linear_probe_beside_the_knn(tmp_path: Path) -> None:
    """Of the same features as the kNN; none by default."""
    manifest = write_synthetic_set(tmp_path / "shards", 20, 16)
    model = build_model(small_run(manifest.folder, tmp_path / "run"))
    backend: Any = SimpleNamespace(average_local_statistics=lambda: None, full_model=lambda: nullcontext(model))
    metrics = []
    for wanted in (False, True):
        config = small_run(manifest.folder, tmp_path / "run", train=Train(linear_probe=wanted))
        metrics.append(knn_while_training(Session(config, World.single("cpu"), lambda _: None), backend, manifest))
    without, found = metrics
    bank, queries = (extract(model, EvaluationSet(manifest, split, 16, 0), "cpu", 64) for split in ("train", "test"))
    expected = linear_probe(bank, queries, penalty=1e-3)
    assert found == {**without, **{key: value for key, value in found.items() if key.startswith("linear_accuracy")}}
    assert len(found) == len(without) + 3
    assert found["linear_accuracy"] == expected.accuracy
    assert found["linear_accuracy_low"] <= expected.accuracy <= found["linear_accuracy_high"]
