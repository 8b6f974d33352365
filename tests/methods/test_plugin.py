"""A method from a file beside the recipe: the example of clae_dist/methods/README.md, as the README says."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.plugins import find_beside
from tests import processes
from tests.processes import ROOT, Completed
from tests.small_run import assert_same_weights

README = (ROOT / "clae_dist" / "methods" / "README.md").read_text()
GUIDE = README[README.index("## Add a method") :]
OBJECTIVE = README[README.index("## Add an objective") :].split("```python\n", 1)[1].split("```")[0]
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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plug-in and its recipe in mine/, images in shards/ and a rank's run in run/."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "mine").mkdir()
    (folder / "mine" / "pushed.py").write_text(block("python"))
    (folder / "mine" / "recipe.yaml").write_text(block("yaml") + SMALL)
    write_synthetic_set(folder / "shards", 16, 16)
    done = clae(folder, *train(folder), "launch.workers=1")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def train(folder: Path) -> tuple[str, ...]:
    return "train", "mine/recipe.yaml", f"data.shards={folder / 'shards'}", f"run_dir={folder / 'run'}"


def clae(folder: Path, *arguments: object, home: str = "home") -> Completed:
    """`clae` in this folder, for the user of this home."""
    environment = processes.environment(HOME=str(folder / home), XDG_STATE_HOME=str(folder / home))
    return processes.clae(*arguments, cwd=folder, env=environment)


@pytest.mark.slow
def test_the_example_passes_parity_on_two_ranks(home: Path) -> None:
    done = clae(home, "parity", "mine/recipe.yaml", "--world-size", "2", "--steps", "2", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["passed"]
    assert found["delta_sign_agreement"] == 1
    assert found["input_grad"]["absolute"] < 1e-10


def test_a_run_records_its_plugin_and_keeps_to_it(home: Path, tmp_path: Path) -> None:
    assert "loss_adversarial" in (home / "run" / "metrics.jsonl").read_text()
    assert list(json.loads((home / "run" / "run.json").read_text())["plugins"]) == ["pushed:Pushed"]

    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    plugin = tmp_path / "mine" / "pushed.py"
    plugin.write_text(plugin.read_text() + "\n# another source\n")
    done = clae(tmp_path, *train(home))
    assert done.returncode == 2
    assert "the source of pushed:Pushed has changed" in done.stdout + done.stderr


@pytest.mark.slow
def test_an_objective_of_ones_own_trains_under_torchrun_as_under_the_local_launcher(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    objective = "mine_nt_xent:margin_nt_xent"
    (tmp_path / "mine" / "mine_nt_xent.py").write_text(OBJECTIVE)
    (tmp_path / "mine" / "recipe.yaml").write_text(
        f"objective: {{name: '{objective}', margin: 0.2}}\nmethod: {{name: simclr}}\n" + SMALL
    )
    environment = processes.environment(HOME=str(tmp_path), XDG_STATE_HOME=str(tmp_path))
    for launcher, start in (("local", processes.CLAE), ("torchrun", processes.TORCHRUN)):
        more = (f"data.shards={home / 'shards'}", f"run_dir={tmp_path / launcher}", "--launcher", launcher)
        done = processes.run(*start, "train", "mine/recipe.yaml", *more, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(json.loads((tmp_path / launcher / "run.json").read_text())["plugins"]) == [objective]
    assert_same_weights(tmp_path / "local", tmp_path / "torchrun", steps=2)


def test_a_foreign_run_folder_imports_nothing(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "run", tmp_path / "foreign")
    (tmp_path / "pushed.py").write_text("raise SystemExit('imported')\n")  # the working directory is on the import path
    done = clae(tmp_path, "export", str(tmp_path / "foreign"), home="other")
    assert done.returncode == 2
    assert "imported" not in (done.stdout + done.stderr).replace("not imported", "")
    assert "--trust" in done.stdout + done.stderr


def test_a_file_beside_the_recipe_hides_no_installed_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "colorsys.py").touch()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "first")
    find_beside(tmp_path / "recipe.yaml", ["colorsys:Method", "nt_xent"])
    assert sys.path[-1] == str(tmp_path)
    assert os.environ["PYTHONPATH"] == f"first{os.pathsep}{tmp_path}"
