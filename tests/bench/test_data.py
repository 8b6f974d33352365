"""`clae bench data`: one shape with the other benches, equal results first, advice that follows from the figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.transforms import v2

from clae_dist.bench import data, data_peers
from clae_dist.bench.chunk import Chunk
from clae_dist.bench.measure import UnequalError
from clae_dist.cli import main
from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from tests.http_faults import serve

SETTINGS = replace(data.QUICK, repeats=1, batches=1, rate=1000.0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("data") / "shards", 12, 80, num_shards=2)


@pytest.mark.slow
def test_every_stage_beside_its_peers(manifest: Manifest) -> None:
    outcome = data.bench(replace(SETTINGS, shards=str(manifest.folder)), lambda text: None)
    found = json.loads(outcome.as_json())
    names: dict[str, set[str]] = {}
    for row in found["rows"]:
        names.setdefault(row["case"], set()).add(row["what"].split(":")[0])
        assert row["more"]["images_per_s"] == pytest.approx(1 / row["median_s"])
    assert list(names.values()) == [
        {"ours", "pil", "decode", "huffman"},
        {"read", "decode", "crop", "collate", "transfer", "augment"},
        {"ours", "v2", *(["kornia"] if data_peers.kornia_photometric(64) else [])},
        {"ours", "pil_simclr", "v2_simclr"},
        {"ours", "ours_copied", "webdataset"},
        {"ours_0", "ours_1", "threads_1", "pil_1"},
    ]
    floors = [row["floor_s"] for row in found["rows"] if "two crops, one core" in row["case"]]
    assert floors == [floors[0]] * 4
    ready = next(row for row in found["rows"] if "JPEG to host-ready" in row["case"] and row["what"].startswith("ours:"))
    cores = 1000 * ready["median_s"]
    assert f"needs {cores:.1f} cores: data.workers={math.ceil(cores)}" in found["notes"][-1]


def _chunk(manifest: Manifest) -> Chunk:
    return Chunk.of(manifest, replace(SETTINGS, shards=str(manifest.folder)))


def test_decoding_on_the_device_is_compared_with_the_hosts(manifest: Manifest) -> None:
    rows = data.decoding(_chunk(manifest), SETTINGS, torch.device("cpu"), lambda text: None)
    assert [row.name for row in rows] == ["host", "device"]
    assert "0.00 of 255 levels apart" in rows[1].what  # the CPU's decoder is the one that we use


def test_other_decoded_pixels_are_not_timed(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    right = data.decode_jpeg
    monkeypatch.setattr(data, "decode_jpeg", lambda *given, **more: [255 - image for image in right(*given, **more)])
    with pytest.raises(UnequalError, match="decoding on cpu differs from ours by"):
        data.decoding(_chunk(manifest), SETTINGS, torch.device("cpu"), lambda text: None)


def test_other_pixels_are_not_timed(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    right = data_peers.pil_crops
    monkeypatch.setattr(data_peers, "pil_crops", lambda *arguments: right(*arguments).flip(-1))
    with pytest.raises(UnequalError, match="two crops differ from Pillow's by up to"):
        data.bench(replace(SETTINGS, shards=str(manifest.folder)), lambda text: None)


def test_other_bytes_are_not_timed(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    right = data_peers.webdataset_samples
    monkeypatch.setattr(data_peers, "webdataset_samples", lambda *arguments: (data[::-1] for data in right(*arguments)))
    with pytest.raises(UnequalError, match="yields sample 0 of train-000000.tar"):
        data.bench(replace(SETTINGS, shards=str(manifest.folder)), lambda text: None)


def test_another_augmentation_is_not_timed(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_peers, "photometric", lambda size: [v2.RandomInvert(1.0)])
    with pytest.raises(UnequalError, match="augmentation: v2 has mean, deviation, contrast and saturation"):
        data.bench(replace(SETTINGS, shards=str(manifest.folder)), lambda text: None)


@pytest.mark.parametrize("where", ["http", pytest.param("plain", marks=pytest.mark.slow)])
def test_sets_from_elsewhere_and_other_splits(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("CLAE_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "measure_loaders", lambda *arguments: [])  # others' tests start processes
    with serve(manifest.folder) as server:
        shards, split = (server.url, "test") if where == "http" else (f"{server.url}/train-{{000000..000001}}.tar", "train")
        outcome = data.bench(replace(SETTINGS, split=split, shards=shards), lambda text: None)
    assert any(f"12 of {split}" in note for note in outcome.notes)
    assert any(row.what.startswith("webdataset") for row in outcome.rows)


def test_options_of_another_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", str(tmp_path)]) == 2
    assert "which `clae bench step` does not use; only `clae bench data` does" in capsys.readouterr().err
    assert main(["bench", "data", str(tmp_path / "none")]) == 3
