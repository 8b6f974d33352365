"""Encoders with their preprocessing, from runs and from exports."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.manifest import load_manifest
from clae_dist.deploy.encoder import load_encoder
from clae_dist.deploy.export import export_encoder
from clae_dist.errors import ConfigError
from clae_dist.runs.checkpoint import load_model

MakeRun = Callable[..., Path]
ENCODERS = (("small_resnet", 16), ("timm/resnet18", 32), ("timm/vit_tiny_patch16_224", 32), ("torchvision/resnet18", 72))


@pytest.mark.parametrize(("name", "size"), [*ENCODERS[:-1], pytest.param(*ENCODERS[-1], marks=pytest.mark.slow)])
def test_features_are_those_of_evaluation(make_run: MakeRun, name: str, size: int) -> None:
    run = make_run(f"model.encoder={name}", f"data.image_size={size}")
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = {route: load_model(run)[1].features(images, route=route) for route in ("clean", "adversarial")}
        clean, exported = load_encoder(run), load_encoder(export_encoder(run))
        torch.testing.assert_close(clean(images), expected["clean"], rtol=0, atol=0)
        torch.testing.assert_close(exported(images), expected["clean"], rtol=0, atol=0)
        if "vit" not in name:
            adversarial = load_encoder(run, route="adversarial")(images)
            torch.testing.assert_close(adversarial, expected["adversarial"], rtol=0, atol=0)
            assert not torch.equal(adversarial, expected["clean"])
    assert clean.num_features == exported.num_features == expected["clean"].shape[1]
    assert (clean.source["step"], exported.source["step"], clean.training) == (7, 7, False)


def test_transform_is_evaluations_view(make_run: MakeRun, labelled_shards: Path) -> None:
    encoder = load_encoder(make_run())
    views = EvaluationSet(load_manifest(labelled_shards), "train", 16).images([3]).views
    from clae_dist.data.shards import ShardReader

    data, _ = ShardReader(load_manifest(labelled_shards), "train").encoded(0, 3)
    view = encoder.transform(Image.open(io.BytesIO(data)))
    assert view.dtype == torch.float32
    assert torch.equal(view, views[0].float() / 255)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "LA", "I;16", "1"])
def test_transform_takes_images_in_memory(make_run: MakeRun, mode: str) -> None:
    image = Image.new("RGB", (40, 20), "white")
    image = Image.new("I;16", (40, 20), 65535) if mode == "I;16" else image.convert(mode)
    view = load_encoder(make_run(checkpoint=True)).transform(image)
    assert view.shape == (3, 16, 16)
    assert (view == 1).all()


def test_loading_leaves_the_random_numbers_alone(make_run: MakeRun) -> None:
    run = make_run()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_encoder(run)
    assert torch.equal(torch.rand(1), expected)


def test_a_folder_that_is_neither(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds neither a run's config.yaml nor an export's config.json"):
        load_encoder(tmp_path)
    with pytest.raises(ConfigError, match="holds no checkpoint yet"):
        load_encoder(make_run(checkpoint=False))


def test_routes_that_are_not_there(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("model.encoder=timm/vit_tiny_patch16_224", "data.image_size=32")
    with pytest.raises(ConfigError, match="route is 'adversarial', but the encoder of .* has no such norm layers"):
        load_encoder(run, route="adversarial")
    with pytest.raises(ConfigError, match="is an export, which holds the clean one; name the run"):
        load_encoder(export_encoder(run), route="adversarial")
    with pytest.raises(ConfigError, match="route is 'dirty'; use one of clean, adversarial"):
        load_encoder(run, route="dirty")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "timm/hf-hub:evil/model"}, "which timm does not have"),
        ({"encoder": 3}, "encoder is '3'"),
        ({"input_size": [3, 10**9, 10**9]}, "input_size is"),
        ({"mean": [float("nan"), 0, 0]}, "config.json cannot be used .*NaN"),
        ({"format_version": "clae-dist encoder 9"}, "format_version is"),
        ({"encoder": "timm/resnet18", "stem": None}, "encoder.safetensors cannot be used"),
    ],
)
def test_a_foreign_description_runs_and_fetches_nothing(make_run: MakeRun, change: dict[str, object], message: str) -> None:
    export = export_encoder(make_run())
    description = json.loads((export / "config.json").read_text()) | change
    (export / "config.json").write_text(json.dumps(description))
    with pytest.raises(ConfigError, match=message):
        load_encoder(export)


@pytest.mark.parametrize("damage", ["cut short", "pickle", "NaN", "missing", "fewer"])
def test_damaged_weights(make_run: MakeRun, damage: str) -> None:
    export = export_encoder(make_run())
    path = export / "encoder.safetensors"
    weights = load(path.read_bytes())
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "pickle":
        torch.save(weights, path)
    elif damage == "missing":
        path.unlink()
    else:
        name = min(weights)
        weights = {**weights, name: torch.full_like(weights[name], torch.nan)} if damage == "NaN" else weights
        path.write_bytes(save({key: value for key, value in weights.items() if damage != "fewer" or key != name}))
    with pytest.raises(ConfigError, match="encoder.safetensors cannot be used .*; export the encoder again with `clae export"):
        load_encoder(export)
