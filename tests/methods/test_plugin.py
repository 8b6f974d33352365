"""A method from a file beside the recipe: the example of clae_dist/methods/README.md, as the README says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clae_dist.data.synthetic import write_synthetic_set

ROOT = Path(__file__).parents[2]
README = (ROOT / "clae_dist" / "methods" / "README.md").read_text()
GUIDE = README[README.index("## Add a method") :]
SMALL = (
    "data: {image_size: 16, workers: 0}\n"
    "batch: {global_size: 8}\n"
    "model: {encoder: small_resnet, projector_dim: 16}\n"
    "optim: {name: sgd, scaling: none, learning_rate: 0.01, warmup_epochs: 0}\n"
    "train: {epochs: 1, threads: 1}\n"
    "tracking: {name: none}\n"
    "launch: {launcher: local, workers: 2, device: cpu}\n"
)


def block(language: str) -> str:
    """The first code block of that language in the guide."""
    found = re.search(rf"```{language}\n(.*?)```", GUIDE, re.S)
    assert found is not None
    return found.group(1)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "pushed.py").write_text(block("python"))
    (folder / "recipe.yaml").write_text(block("yaml") + SMALL)
    write_synthetic_set(tmp_path / "shards", 16, 16)
    return folder / "recipe.yaml"


def clae(tmp_path: Path, *arguments: str, home: str = "home") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / home), "XDG_STATE_HOME": str(tmp_path / home)}
    command = [sys.executable, "-m", "clae_dist", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)


def test_the_example_passes_parity_on_two_ranks(recipe: Path, tmp_path: Path) -> None:
    done = clae(tmp_path, "parity", str(recipe), "--world-size", "2", "--steps", "2", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["passed"]
    assert found["delta_sign_agreement"] == 1
    assert found["input_grad"]["absolute"] < 1e-10


def test_a_run_records_its_plugin_and_keeps_to_it(recipe: Path, tmp_path: Path) -> None:
    train = ["train", str(recipe), f"data.shards={tmp_path / 'shards'}", f"run_dir={tmp_path / 'run'}"]
    done = clae(tmp_path, *train)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss_adversarial" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert list(json.loads((tmp_path / "run" / "run.json").read_text())["plugins"]) == ["pushed:Pushed"]

    plugin = recipe.parent / "pushed.py"
    plugin.write_text(plugin.read_text() + "\n# another source\n")
    done = clae(tmp_path, *train)
    assert done.returncode == 2
    assert "the source of pushed:Pushed has changed" in done.stdout + done.stderr


def test_a_foreign_run_folder_imports_nothing(recipe: Path, tmp_path: Path) -> None:
    train = ["train", str(recipe), f"data.shards={tmp_path / 'shards'}", f"run_dir={tmp_path / 'run'}"]
    assert clae(tmp_path, *train).returncode == 0
    shutil.copytree(tmp_path / "run", tmp_path / "foreign")
    (tmp_path / "pushed.py").write_text("raise SystemExit('imported')\n")  # the working directory is on the import path
    done = clae(tmp_path, "export", str(tmp_path / "foreign"), home="other")
    assert done.returncode == 2
    assert "imported" not in (done.stdout + done.stderr).replace("not imported", "")
    assert "--trust" in done.stdout + done.stderr
