"""`clae export --format onnx-int8` of an encoder that was trained on real images, and its report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from clae_dist.cli import main
from clae_dist.data.manifest import load_manifest
from clae_dist.deploy.encoder import Encoder, load_encoder
from clae_dist.deploy.layout import Contents
from clae_dist.deploy.onnx_graph import Graph, write_graph
from clae_dist.deploy.onnx_int8 import quantise
from clae_dist.deploy.run_images import open_images
from clae_dist.errors import BAD_CONFIG, OK, ConfigError
from data_prep import demo
from tests import processes

MakeRun = Callable[..., Path]
STEPS, BATCH = 60, 128


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SimCLR on scikit-learn's 1,797 handwritten digits: few images, of which an encoder learns much in a minute."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["data_prep", "prepare", str(demo._digits(folder / "cache")), str(folder / "shards"), "--test-share", "0.2"]
    processes.run(sys.executable, "-m", *words, check=True)
    epochs = STEPS * BATCH / load_manifest(folder / "shards").num_samples("train")
    settings = [f"train.epochs={epochs}", "train.knn_every=0", "optim.warmup_epochs=0.03", "train.diagnose_every=1000"]
    places = [f"data.shards={folder / 'shards'}", f"run_dir={folder / 'run'}", "launch.launcher=local", "launch.workers=1"]
    done = processes.clae(
        "train", "quickstart", *places, *settings, "launch.device=cpu", "tracking.name=none", "method.name=simclr", timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.mark.slow
def test_int8_agrees_with_float32(trained: Path, tmp_path: Path) -> None:
    settings = ["--format", "onnx-int8", "--head", "--calibration", "128"]
    export = tmp_path / "export"
    done = processes.clae("export", str(trained), "--to", str(export), *settings, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((export / "onnx-int8.json").read_text())
    assert "encoder-int8.onnx: " in done.stdout
    assert report["calibration"] == {"images": 128, "split": "train"}
    assert report["weights"] == load_encoder(export).weights_digest() == Graph(export / "encoder-int8.onnx").weights
    assert report["bytes"]["float32"] > 3 * report["bytes"]["int8"]
    assert report["knn"]["float32"]["percent"] >= 80
    assert report["knn_agreement"]["percent"] >= 97
    assert report["cosine"]["mean"] >= 0.99
    for kind in ("old_head", "new_head"):
        assert abs(report["linear"][kind]["percent"] - report["linear"]["float32"]["percent"]) <= 2
    assert report["ece"].keys() == report["linear"].keys() == {"float32", "old_head", "new_head"}
    attacked = {name: share["percent"] for name, share in report["robust"].items()}
    assert attacked["float32 0/255"] > attacked["float32 2/255"] >= attacked["float32 8/255"]
    assert attacked["int8 0/255"] > attacked["int8 2/255"]  # the attack transfers
    for batch in ("1", "32"):
        assert 0 < report["latency"]["int8"][batch]["p50_ms"] <= report["latency"]["int8"][batch]["p95_ms"]
    readme = (export / "README.md").read_text()
    assert f"| kNN: same class as float32 |  | {report['knn_agreement']['percent']:.1f} % (" in readme

    images = open_images(trained)
    calibration, test = images.views("train", 64), images.views("test", 200)
    quantise(export / "encoder.onnx", tmp_path / "int8.onnx", calibration)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    quantise(export / "encoder.onnx", tmp_path / "shuffled.onnx", calibration[order])
    quantise(export / "encoder.onnx", tmp_path / "tensor.onnx", calibration, per_channel=False)
    features = {name: Graph(tmp_path / f"{name}.onnx").features(test) for name in ("int8", "shuffled", "tensor")}
    assert torch.equal(features["int8"], features["shuffled"])
    expected = Graph(export / "encoder.onnx").features(test)
    cosines = {name: float(F.cosine_similarity(rows, expected).mean()) for name, rows in features.items()}
    assert cosines["tensor"] <= cosines["int8"]
    single = torch.cat([Graph(tmp_path / "int8.onnx").features(one[None]) for one in test[:8]])
    assert torch.equal(single, features["int8"][:8])
    weights = {one.name: one for one in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert {one.data_type for name, one in weights.items() if one.dims[1:] and "quantized" in name} == {onnx.TensorProto.INT8}


@pytest.mark.slow
def test_a_set_without_labels_has_no_accuracies(make_run: MakeRun, shards: Callable[..., Path]) -> None:
    run = make_run(data=shards(labelled=False))
    assert main(["export", str(run), "--format", "onnx-int8", "--calibration", "16"]) == OK
    report = json.loads((run / "export" / "onnx-int8.json").read_text())
    assert report["no_accuracies"] == "no image of train has a label"
    assert "knn" not in report
    assert "No accuracies: no image of train has a label." in (run / "export" / "README.md").read_text()
    assert main(["export", str(run), "--head"]) == BAD_CONFIG


def test_calibration_needs_images(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for count in (0, 5000):
        with pytest.raises(ConfigError, match=f"--calibration is {count}; use 1 to 4096 images"):
            Contents.parse("onnx-int8", count)
    run = make_run(data=tmp_path / "gone")
    assert main(["export", str(run), "--format", "onnx-int8"]) != OK
    assert "gone" in capsys.readouterr().err
    assert not (run / "export").exists()


def test_a_large_channel_of_the_residual_stream_does_not_cost_the_others(tmp_path: Path) -> None:
    """As in trained transformers: one step of int8 for a whole sum would round the small channels away."""
    torch.manual_seed(0)
    network = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    with torch.no_grad():
        network.pos_embed[..., 3] += 8
    encoder = Encoder(network.eval(), 32, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), {})
    images = (200 * torch.rand(64, 3, 1, 1) + 55 * torch.rand(64, 3, 16, 16)).to(torch.uint8)
    write_graph(encoder, tmp_path / "float32.onnx", {})
    quantise(tmp_path / "float32.onnx", tmp_path / "int8.onnx", images)
    float32, int8 = (Graph(tmp_path / f"{name}.onnx").features(images) for name in ("float32", "int8"))
    middle = float32.mean(0)  # which all images share, and a plain cosine would mostly see
    assert F.cosine_similarity(float32 - middle, int8 - middle).mean() > 0.95  # 0.99; 0.15 with int8 additions
