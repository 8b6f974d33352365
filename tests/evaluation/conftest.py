"""A finished tiny run and its shards, made without training anything."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clae_dist.config import Config
from clae_dist.data.manifest import Shard, write_manifest
from clae_dist.evaluation.features import Features
from clae_dist.models import build_model
from clae_dist.recipe import resolve, to_yaml
from clae_dist.report.curves import CHARTS
from tests.checkpoints import write_checkpoint

CLASSES = ("blue", "green", "red")
SIDE = 16


class Tensors:
    """An evaluation set in memory."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self, batch_size: int, start: int = 0, step: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for first in range(start * batch_size, len(self), step * batch_size):
            rows = slice(first, first + batch_size)
            yield self.images[rows], self.labels[rows], torch.arange(len(self))[rows]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_memory() -> type[Tensors]:
    return Tensors


@pytest.fixture
def features_of() -> Callable[..., Features]:
    def make(features: torch.Tensor, labels: Any) -> Features:
        return Features(features.float(), torch.as_tensor(labels).long(), torch.arange(len(features)))

    return make


def _jpeg(label: int, number: int) -> bytes:
    """Noise around one of three colours: classes that an untrained encoder can tell apart."""
    noise = np.random.default_rng([label, number]).integers(0, 120, (SIDE, SIDE, 3))
    noise[:, :, 2 - label] += 110
    stream = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _write_split(folder: Path, split: str, count: int, label_of: Callable[[int], int]) -> Shard:
    path, rows = folder / f"{split}-000000.tar", []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            data = _jpeg(number % 3, number + (1000 if split == "test" else 0))
            member = tarfile.TarInfo(f"{number:06d}.png")
            member.size = len(data)
            rows.append((tar.offset + 512, len(data), label_of(number)))
            tar.addfile(member, io.BytesIO(data))
    index = folder / f"{split}-000000.index.npy"
    np.save(index, np.array(rows, dtype=np.int64))
    sha256, index_sha256 = (hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, index))
    return Shard(path.name, count, path.stat().st_size, sha256, index_sha256)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of shards: 150 train and 30 test images of three colours, with or without labels and a test split.

    `label_of` gives other labels by the image's number, `classes` their names.
    """

    def make(
        labelled: bool = True,
        test: bool = True,
        label_of: Callable[[int], int] | None = None,
        classes: tuple[str, ...] = CLASSES,
    ) -> Path:
        folder = tmp_path_factory.mktemp("shards")
        sizes = {"train": 150, "test": 30} if test else {"train": 150}
        label_of = label_of or (lambda number: number % 3 if labelled else -1)
        splits = {split: (_write_split(folder, split, count, label_of),) for split, count in sizes.items()}
        write_manifest(
            folder,
            name="colours",
            source="made up",
            licence="none",
            classes=classes if labelled else (),
            splits=splits,
            quarantined=0,
            preparation={},
        )
        return folder

    return make


@pytest.fixture(scope="session")
def labelled_shards(shards: Callable[..., Path]) -> Path:
    return shards()


def _disturb(model: torch.nn.Module) -> None:
    """Weights and statistics as after some training: nothing is at its initial value, and the two routes differ."""
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(0.05 * torch.rand(value.shape, generator=generator))


@pytest.fixture
def make_run(tmp_path: Path, labelled_shards: Path) -> Callable[..., Path]:
    """make_run("model.encoder=…", checkpoint=True, shards=…): a run folder with configuration, run.json and checkpoint."""

    def make(*overrides: str, checkpoint: bool = True, data: Path | None = None, run_dir: Path | None = None) -> Path:
        run_dir = run_dir or tmp_path / "run"
        run_dir.mkdir(parents=True)
        settings = [
            "name=tiny <run>",
            f"data.shards={data or labelled_shards}",
            "data.image_size=16",
            "model.encoder=small_resnet",
            "batch.global_size=32",
            "evaluation.knn_k=20",
            "tracking.name=none",
        ]
        given = {text.partition("=")[0] for text in overrides}
        config, origins = resolve(None, [text for text in settings if text.partition("=")[0] not in given] + [*overrides])
        (run_dir / "config.yaml").write_text(to_yaml(config, origins))
        identity = {"package_version": "0.1.0", "git_revision": "", "manifest_digest": "d" * 64, "world_size": 2}
        (run_dir / "run.json").write_text(
            json.dumps({**identity, "backend": "ddp", "collectives": "gloo", "run_key": "k", "started": 0.0})
        )
        if checkpoint:
            _save(config, run_dir)
        return run_dir

    return make


def _save(config: Config, run_dir: Path) -> None:
    model = build_model(config)
    _disturb(model)
    write_checkpoint(run_dir, 7, {f"model/{name}": value for name, value in model.state_dict().items()})  # 224 images seen


def _line(images_seen: int, **values: float) -> dict[str, float]:
    return {"images_seen": images_seen, "step": images_seen // 32, "epoch": images_seen / 150, **values}


@pytest.fixture
def metrics() -> list[dict[str, float]]:
    """Every key once a step; the run was started again after 128 images, so 96 and 128 appear twice."""
    curves = [curve for chart in CHARTS for curve in (*chart.curves, *chart.otherwise) if not curve.key.endswith("_accuracy")]
    keys = {key for curve in curves for key in (curve.key, curve.step_key) if key}
    first = [_line(n, time_s=n / 32, **dict.fromkeys(keys, 9.0)) for n in (32, 64, 96, 128)]
    second = [_line(n, time_s=n / 32 + 0.25, **dict.fromkeys(keys, float(n) / 32)) for n in (96, 128, 160, 192, 224)]
    return [_line(0, time_s=0.5, knn_accuracy=40.0), *first, *second, _line(224, time_s=7.75, knn_accuracy=55.0)]


@pytest.fixture
def write_metrics(metrics: list[dict[str, float]]) -> Callable[[Path], None]:
    def write(run: Path) -> None:
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))

    return write
