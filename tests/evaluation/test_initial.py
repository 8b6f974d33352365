"""`model.init`: encoders that start from pretrained weights, files, exports and runs."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clae_dist.config import Config, Data, Evaluation, Model, Parallel, Train
from clae_dist.deploy.encoder import load_encoder
from clae_dist.deploy.export import export_encoder
from clae_dist.deploy.initial import resolve
from clae_dist.errors import ConfigError
from clae_dist.evaluation.evaluate import evaluate_run
from clae_dist.methods.simclr import SimClr
from clae_dist.models import PretrainModel, build_model
from clae_dist.models.encoders import build_encoder
from clae_dist.parallel import make_backend
from clae_dist.recipe import Recipe
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.initial import load_initial
from clae_dist.training.train import train
from clae_dist.world import World
from tests.ranks import RankPool
from tests.small_run import small_run

MakeRun = Callable[..., Path]
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def config_of(run_dir: Path, init: Path | str, **model: Any) -> Config:
    settings = {"encoder": "small_resnet", "projector_dim": 8, **model}
    return Config(run_dir=str(run_dir), data=Data(image_size=16), model=Model(init=str(init), **settings))


def begin(config: Config) -> PretrainModel:
    """The model of a new run in its folder."""
    config.folder.mkdir(exist_ok=True)
    resolve(config).write(RunFolder(config.folder))
    model = build_model(config)
    load_initial(config.model, config.folder, model.encoder)
    return model.eval()


def small_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return build_encoder(Model(encoder="small_resnet"), 16)[0].state_dict()


def test_the_features_are_the_sources_along_both_routes(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    source, expected = load_encoder(run), {}
    save_file(
        {f"module.encoder.{name}": value for name, value in source.network.state_dict().items()}, tmp_path / "a.safetensors"
    )
    for init in (run, export_encoder(run), run / "export/encoder.safetensors", tmp_path / "a.safetensors"):
        config = config_of(tmp_path / "new", init)
        model = begin(config)
        for route in ("clean", "adversarial"):
            with torch.no_grad():
                torch.testing.assert_close(model.features(IMAGES, route), source(IMAGES), rtol=0, atol=1e-6)
        digest = resolve(config).digest
        assert expected.setdefault("digest", digest) == digest, "the same weights have the same digest wherever they are"
    assert not torch.allclose(model.features(IMAGES), build_model(config_of(tmp_path, "")).eval().features(IMAGES))


def features_of_backend(world: World, config: Config) -> torch.Tensor:
    model = build_model(config, world.group)
    load_initial(config.model, config.folder, model.encoder)
    backend = make_backend(config, model, world)
    backend.model.eval()
    with torch.no_grad():
        return backend.embed(IMAGES, "clean").cpu()


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_backends_start_alike(ranks: RankPool, tmp_path: Path, backend: Any) -> None:
    """The embeddings of each backend are those of the plain model."""
    save_file(small_weights(), tmp_path / "a.safetensors")
    config = config_of(tmp_path / "new", tmp_path / "a.safetensors")
    with torch.no_grad():
        expected = begin(config)(IMAGES)
    parallel = Config(
        run_dir=config.run_dir,
        data=config.data,
        model=config.model,
        parallel=Parallel(backend=backend),
        method=SimClr.Settings(),
    )
    for found in ranks.run(2, features_of_backend, parallel):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_run_keeps_its_start_and_needs_the_source_no_more(make_run: MakeRun, labelled_shards: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(make_run(), source)
    config = small_run(
        labelled_shards,
        tmp_path / "new",
        model=Model(encoder="small_resnet", projector_dim=8, init=str(source)),
        train=Train(epochs=1, threads=1),
        evaluation=Evaluation(knn_k=20),
    )
    said = io.StringIO()
    assert train(Recipe(config), World.single("cpu"), said).status == "finished"
    assert "72 tensors loaded" in said.getvalue()
    identity = RunFolder(config.folder).read_identity()
    assert identity.tags["initial_weights_source"] == str(source)
    assert json.loads(RunFolder(config.folder).initial_file.read_text())["digest"] == identity.initial["digest"]
    exported = json.loads((export_encoder(config.folder) / "config.json").read_text())
    assert exported["initial_weights"] == identity.initial
    before = load_encoder(source)(IMAGES)
    weights = RunFolder(config.folder).initial_file
    kept = weights.read_text()
    weights.unlink()  # as if the first start had been killed before it was written, and the source changed since
    run_json = RunFolder(config.folder).identity_file
    right = run_json.read_text()
    run_json.write_text(right.replace(identity.initial["digest"], "0" * 64))
    with pytest.raises(ConfigError, match="weights have changed since this run was begun"):
        train(Recipe(config), World.single("cpu"), io.StringIO())
    run_json.write_text(right)
    weights.write_text(kept)
    shutil.rmtree(source)
    assert train(Recipe(config), World.single("cpu"), io.StringIO()).status == "finished"  # again: nothing is left to do
    assert evaluate_run(config.folder, say=lambda text: None)["results"]["knn"]
    untrained = build_model(config)
    load_initial(config.model, config.folder, untrained.encoder)
    torch.testing.assert_close(untrained.eval().features(IMAGES), before, rtol=0, atol=1e-6)


# ---- sources that do not fit ----


def write(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    state = small_weights()
    change(state)
    save_file(state, path)
    return path


def test_the_classifier_is_unused_and_said_to_be(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lambda state: state.update({"fc.weight": torch.ones(10, 256)}))
    found = resolve(config_of(tmp_path, path)).match
    assert found.describe() == "72 tensors loaded; 1 of the source not in the encoder (fc.weight)"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("bn.weight"), r"71 tensors loaded; 1 not in the source \(bn.weight\)"),
        (
            lambda state: state.update({"stem.weight": torch.ones(32, 1, 3, 3)}),
            r"stem.weight: \(32, 1, 3, 3\) there, \(32, 3, 3, 3\) here",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_or_start_at_random(tmp_path: Path, change: Any, words: str) -> None:
    path = write(tmp_path / "a.safetensors", change)
    with pytest.raises(ConfigError, match=words + r".*model.init_missing=random"):
        resolve(config_of(tmp_path / "new", path))
    config = config_of(tmp_path / "new", path, init_missing="random")
    model, plain = begin(config), build_model(config_of(tmp_path, "")).eval()
    assert len(resolve(config).weights) == 71
    name = "stem.weight" if "stem" in words else "bn.clean.weight"
    assert torch.equal(model.encoder.state_dict()[name], plain.encoder.state_dict()[name])


def test_the_stem_that_small_images_replace_starts_at_random(tmp_path: Path) -> None:
    """ImageNet's weights on 32 pixels: only the first convolution differs, and the line says so."""
    torch.manual_seed(3)
    save_file(build_encoder(Model(encoder="timm/resnet18", stem="imagenet"), 224)[0].state_dict(), tmp_path / "a.safetensors")
    config = Config(
        run_dir=str(tmp_path / "new"),
        data=Data(image_size=32),
        model=Model(encoder="timm/resnet18", init=str(tmp_path / "a.safetensors")),
    )
    line = resolve(config).match.describe()
    assert "1 of another shape (conv1.weight: (64, 3, 7, 7) there, (64, 3, 3, 3) here)" in line


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("weights.pth", b"\x80\x04", "a pickle, which can run any code"),
        ("weights.h5", b"", "no .safetensors file"),
        ("weights.safetensors", b"\x10\x00", "cannot be read"),
        ("", b"", "neither a file nor a folder"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / (name or "missing")
    if name:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        resolve(config_of(tmp_path, path))


def test_weights_of_another_encoder_and_nan(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lambda state: state["bn.weight"].fill_(torch.nan))
    with pytest.raises(ConfigError, match="bn.weight holds NaN"):
        resolve(config_of(tmp_path, path))
    with pytest.raises(ConfigError, match=r"not those of model.encoder timm/resnet18: 0 tensors loaded"):
        resolve(config_of(tmp_path, path, encoder="timm/resnet18"))


def test_published_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm is asked for them by name; here it answers without a network."""
    import timm

    asked: list[str] = []

    def create(name: str, pretrained: bool, num_classes: int, **arguments: Any) -> nn.Module:
        asked.append(name)
        return right(name.partition(".")[0], pretrained=False, num_classes=num_classes, **arguments)

    right = timm.create_model
    config = config_of(tmp_path, "pretrained", encoder="timm/resnet18", stem="imagenet")
    build_encoder(config.model, 16)
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, **settings: create(name, **settings) if settings["pretrained"] else right(name, **settings),
    )
    assert len(resolve(config).weights) == len(build_encoder(config.model, 16)[0].state_dict())
    resolve(config_of(tmp_path, "timm/resnet18.a1_in1k", encoder="timm/resnet18", stem="imagenet"))
    assert asked == ["resnet18", "resnet18.a1_in1k"]
    with pytest.raises(ConfigError, match="small_resnet has no published weights"):
        resolve(config_of(tmp_path, "pretrained"))

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(
        "torchvision.models.get_model", lambda name, **settings: offline() if settings.get("weights") else nn.Identity()
    )
    with pytest.raises(ConfigError, match=r"OSError: no route to host\); without a network, name a file"):
        resolve(config_of(tmp_path, "torchvision/resnet18", encoder="timm/resnet18"))
