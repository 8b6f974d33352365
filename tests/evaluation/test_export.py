from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from clae_dist.deploy.export import config_digest, export_encoder
from clae_dist.errors import ConfigError
from clae_dist.recipe import from_yaml
from clae_dist.runs.checkpoint import load_model
from clae_dist.training import finish
from tests import processes

MakeRun = Callable[..., Path]

ENCODERS = (
    ("small_resnet", 16, "timm"),
    ("timm/resnet18", 32, "timm"),
    ("timm/vit_tiny_patch16_224", 32, "timm"),
    ("torchvision/resnet18", 32, "torchvision"),
    ("torchvision/resnet18", 72, "torchvision"),  # above 64 pixels: the ImageNet stem
)

# Runs the README's own lines, folder by folder, where `import clae_dist` fails: as on a machine that does not have it.
_RUN_SNIPPETS = """
import os, re, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "clae_dist":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    os.chdir(folder)
    (code,) = re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.DOTALL)
    names = {}
    exec(code, names)
    torch.save(names["features"](torch.load("images.pt")), "features.pt")
"""


@pytest.mark.slow
def test_loads_without_this_package(make_run: MakeRun, tmp_path: Path) -> None:
    """The exact lines of each export's README, in a process that cannot import clae_dist."""
    runs = []
    for number, (encoder, size, library) in enumerate(ENCODERS):
        runs.append(make_run(f"model.encoder={encoder}", f"data.image_size={size}", run_dir=tmp_path / str(number)))
        export = export_encoder(runs[-1])
        assert export == runs[-1] / "export"
        assert json.loads((export / "config.json").read_text())["library"] == library
        torch.save(torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0)), export / "images.pt")
    result = processes.run(sys.executable, "-c", _RUN_SNIPPETS, *(run / "export" for run in runs))
    assert result.returncode == 0, result.stderr
    for run in runs:
        with torch.no_grad():
            expected = load_model(run)[1].features(torch.load(run / "export" / "images.pt"), route="clean")
        # float32: the same network, built by another library's blocks
        torch.testing.assert_close(torch.load(run / "export" / "features.pt"), expected, atol=1e-5, rtol=1e-5)


def test_says_where_the_encoder_comes_from(make_run: MakeRun) -> None:
    run = make_run()
    export = export_encoder(run)
    config = json.loads((export / "config.json").read_text())
    assert config["images_seen"] == 224
    assert config["manifest_digest"] == "d" * 64
    assert config["config_digest"] == config_digest(from_yaml(run / "config.yaml"))
    assert config["input_size"] == [3, 16, 16]
    assert config["mean"] == [0.485, 0.456, 0.406]
    with safe_open(export / "encoder.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        metadata = file.metadata()
    assert metadata["manifest_digest"] == "d" * 64
    assert json.loads(metadata["std"]) == config["std"]
    assert {path.name for path in export.iterdir()} == {"encoder.safetensors", "config.json", "README.md"}


def test_holds_the_clean_route(make_run: MakeRun) -> None:
    """Exporting the adversarial route would load just as well, and be wrong."""
    run = make_run("model.encoder=timm/resnet18", "data.image_size=32")
    weights = load_file(export_encoder(run) / "encoder.safetensors")
    state = load_model(run)[1].encoder.state_dict()
    (clean,) = (value for key, value in state.items() if key.startswith("bn1.") and "clean" in key and "running_mean" in key)
    (adversarial,) = (
        v for key, v in state.items() if key.startswith("bn1.") and "adversarial" in key and "running_mean" in key
    )
    assert torch.equal(weights["bn1.running_mean"], clean)
    assert not torch.equal(clean, adversarial)


def test_the_digest_of_the_configuration_ignores_where_things_lie(make_run: MakeRun, tmp_path: Path) -> None:
    one, moved, other = (
        from_yaml(make_run(*settings, checkpoint=False, run_dir=tmp_path / name) / "config.yaml")
        for name, settings in (("a", []), ("b", ["data.workers=3", "run_dir=elsewhere"]), ("c", ["objective.temperature=0.2"]))
    )
    assert config_digest(one) == config_digest(moved) != config_digest(other)


@pytest.mark.parametrize(
    ("encoder", "size"),
    [
        pytest.param("timm/resnet18", 72, marks=pytest.mark.slow),
        ("timm/vit_tiny_patch16_224", 32),
        ("timm/convnext_atto", 64),
        ("torchvision/resnet18", 72),
    ],
)
def test_timm_loads_the_export(make_run: MakeRun, tmp_path: Path, encoder: str, size: int) -> None:
    """With timm alone, from its local-dir: scheme. torchvision's ResNets have the same weights under the same names."""
    run = make_run(f"model.encoder={encoder}", f"data.image_size={size}")
    export = export_encoder(run, tmp_path / "a folder, with=signs")
    model = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    settings = timm.data.resolve_model_data_config(model)
    assert list(settings["input_size"]) == [3, size, size]
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_model(run)[1].features(images, route="clean")
        features = model((images - mean) / std)
    assert features.shape == expected.shape
    assert (features - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    ("encoder", "size", "problem"),
    [
        ("small_resnet", 16, "its 3x3 stem for small images is not that of timm's resnet18"),
        ("timm/resnet18", 32, "its 3x3 stem for small images is not that of timm's resnet18"),
        ("torchvision/shufflenet_v2_x0_5", 72, "timm has no model 'shufflenet_v2_x0_5'"),
        ("torchvision/efficientnet_b0", 72, "timm's model of that name is another one"),
    ],
)
def test_an_export_that_timm_cannot_load_has_the_reason(make_run: MakeRun, encoder: str, size: int, problem: str) -> None:
    run = make_run(f"model.encoder={encoder}", f"data.image_size={size}")
    said: list[str] = []
    export = finish.export(run, say=said.append)
    assert problem in json.loads((export / "config.json").read_text())["timm_problem"]
    assert said[-1].startswith(f"not in timm's own layout: {problem}")
    assert not (export / "model.safetensors").exists()
    with pytest.raises((RuntimeError, TypeError)):
        timm.create_model(f"local-dir:{export}", pretrained=True)


def test_a_model_with_other_features_is_not_in_timms_layout(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and shapes of weights may fit a model that computes something else, here with another activation."""
    create = timm.create_model

    def other(name: str, **arguments: Any) -> torch.nn.Module:
        model = create(name, **arguments)
        if name.startswith("local-dir:"):
            model.act1 = torch.nn.GELU()
        return model

    monkeypatch.setattr(timm, "create_model", other)
    export = export_encoder(make_run("model.encoder=timm/resnet18", "data.image_size=72"))
    assert "the features of timm's model differ by" in json.loads((export / "config.json").read_text())["timm_problem"]


def test_replaces_an_older_export_and_nothing_else(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    destination = tmp_path / "deep" / "encoder"
    for _ in range(2):
        assert export_encoder(run, destination) == destination
    assert [path.name for path in destination.parent.iterdir()] == ["encoder"]
    (destination / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="which holds other files; name a new folder"):
        export_encoder(run, destination)
    assert (destination / "thesis.tex").read_text() == "years of work"


def test_a_run_without_checkpoint_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint yet"):
        export_encoder(make_run(checkpoint=False))
