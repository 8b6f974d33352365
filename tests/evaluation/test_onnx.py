"""`clae export --format onnx`: the graph computes the encoder's features, on real decoded images, in onnxruntime."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F

from clae_dist.cli import main
from clae_dist.deploy.encoder import load_encoder
from clae_dist.deploy.export import export_encoder
from clae_dist.deploy.layout import GRAPH, Contents
from clae_dist.deploy.onnx_graph import Graph, check_graph, difference, write_graph
from clae_dist.deploy.run_images import open_images
from clae_dist.errors import BAD_CONFIG, OK, ConfigError, DataError
from clae_dist.evaluation.knn import nearest
from clae_dist.runs.checkpoint import load_model

MakeRun = Callable[..., Path]
WITH_ONNX = Contents.parse("safetensors,onnx")


def test_the_command(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Features of any number of images, and each row by itself, as torch computes them along the evaluated route."""
    run = make_run("method.name=acl", "model.projector=mlp")
    assert main(["export", str(run), "--format", "onnx"]) == OK
    assert "encoder.onnx: features differ from torch's by at most" in capsys.readouterr().out
    export = run / "export"
    graph, encoder = Graph(export / GRAPH), load_encoder(export)
    images = open_images(run).views("test", 64)
    assert len(images) == 30
    description = json.loads((export / "config.json").read_text())
    assert description["onnx"] == {
        "difference": pytest.approx(difference(graph, encoder, images)),
        "compared_on": "30 images of test",
    }
    assert description["onnx"]["difference"] <= 1e-5
    expected = load_model(run)[1].features(images.float() / 255, route="adversarial").detach()
    other = load_model(run)[1].features(images.float() / 255, route="clean").detach()
    assert (expected - other).abs().max() > 0.1
    for count in (1, 3, 30):
        torch.testing.assert_close(graph.features(images[:count]), expected[:count], rtol=1e-4, atol=1e-5)
    single = torch.cat([graph.features(one[None]) for one in images])
    torch.testing.assert_close(single, graph.features(images), rtol=1e-4, atol=1e-5)
    assert graph.weights == encoder.weights_digest() == description["weights"]
    assert graph.facts["manifest_digest"] == "d" * 64
    model = onnx.load(export / GRAPH)
    kinds = {node.op_type for node in model.graph.node}
    assert "Conv" in kinds
    assert "BatchNormalization" not in kinds
    assert not re.search(rb"(/root|/home|/work|site-packages|\.py)", (export / GRAPH).read_bytes())

    another = make_run("seed=1", run_dir=run.parent / "another")
    with pytest.raises(ConfigError, match="it is of another encoder, whose weights are"):
        check_graph(export / GRAPH, load_encoder(another), images)
    weights, damaged = encoder.weights_digest(), tmp_path / "damaged.onnx"
    with torch.no_grad():
        encoder.network.get_parameter("stem.weight")[0, 0, 0, 0] += 0.1
    write_graph(encoder, damaged, {})
    model = onnx.load(damaged)
    onnx.helper.set_model_props(model, {"clae-dist weights": weights})
    onnx.save(model, damaged)
    with pytest.raises(ConfigError, match="features of damaged.onnx differ from torch's by"):
        check_graph(damaged, load_encoder(export), images)


def test_what_is_refused(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(checkpoint=False)
    assert main(["export", str(run), "--format", "tflite"]) == BAD_CONFIG
    assert "--format has 'tflite'; use some of safetensors,timm,onnx" in capsys.readouterr().err
    for content in (b"", b"no graph", b"\x08\x07"):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad.onnx cannot be used .*; export it again with `clae export"):
            Graph(tmp_path / "bad.onnx")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else find(name, *rest))
    assert main(["export", str(run), "--format", "onnx"]) == BAD_CONFIG
    assert "ONNX needs onnxscript, not installed here; pip install" in capsys.readouterr().err


class Untraceable(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) if float(x.sum()) > 0 else x.flatten(1) + 1


def test_an_encoder_that_cannot_be_exported_is_refused_and_leaves_nothing(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clae_dist.deploy import export as module

    run = make_run()
    build: Any = module.Encoder

    def untraceable(network: torch.nn.Module, *rest: Any) -> Any:
        return build(Untraceable(), *rest)

    monkeypatch.setattr(module, "Encoder", untraceable)
    monkeypatch.setattr(module, "_exported_state", lambda encoder, network: {})
    with pytest.raises(ConfigError, match=r"torch cannot export this encoder to ONNX \(.*omit onnx from --format"):
        export_encoder(run, contents=WITH_ONNX)
    assert not (run / "export").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "size"),
    [("timm/resnet18", 32), ("timm/vit_tiny_patch16_224", 32), ("timm/convnext_atto", 64), ("torchvision/resnet18", 72)],
)
def test_encoders_of_the_libraries(make_run: MakeRun, encoder: str, size: int, tmp_path: Path) -> None:
    """The same neighbours as well, and the same bytes a second time."""
    run = make_run(f"model.encoder={encoder}", f"data.image_size={size}")
    export = export_encoder(run, contents=WITH_ONNX)
    graph, loaded = Graph(export / GRAPH), load_encoder(export)
    bank, queries = (open_images(run).views(split, 64) for split in ("train", "test"))
    assert difference(graph, loaded, queries) <= 1e-4
    with torch.no_grad():
        bank_NF, query_QF = (loaded(images.float() / 255) for images in (bank, queries))
    rows = nearest(graph.features(queries), graph.features(bank), 1).rows[:, 0]
    best = nearest(query_QF, bank_NF, 1).cosines[:, 0]
    chosen = F.cosine_similarity(query_QF, bank_NF[rows])  # made-up weights put rows so close that float32 cannot order them
    assert (best - chosen).max() <= 1e-5
    write_graph(
        loaded, tmp_path / "again.onnx", {key: value for key, value in graph.facts.items() if key != "clae-dist weights"}
    )
    assert (tmp_path / "again.onnx").read_bytes() == (export / GRAPH).read_bytes()


def test_noise_stands_in_for_images_that_are_gone(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And the README's lines compute the same as the graph."""
    run = make_run(data=tmp_path / "gone")
    export = export_encoder(run, contents=WITH_ONNX)
    assert json.loads((export / "config.json").read_text())["onnx"]["compared_on"].startswith("64 images of noise, because")
    monkeypatch.chdir(export)
    readme = (export / "README.md").read_text()
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(torch.from_numpy(names["features_by_onnx"](images.numpy())), Graph(export / GRAPH).features(images))
    with pytest.raises(DataError, match="elsewhere is not a folder"):
        export_encoder(run, contents=WITH_ONNX, shards=str(tmp_path / "elsewhere"))
