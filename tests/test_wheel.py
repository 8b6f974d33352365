"""The package as a wheel, installed in a folder of its own and used in an empty one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.processes import ROOT, Completed


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which pip has installed the wheel, without its dependencies."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for name in ("clae_dist", "configs", "data_prep"):  # a build leaves files beside its sources
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    offline = ("--no-deps", "--quiet", "--disable-pip-version-check")
    _pip("wheel", str(source), *offline, "--no-build-isolation", "-w", str(wheels))
    _pip("install", *offline, "--target", str(target), *map(str, wheels.glob("*.whl")))
    return target


def _pip(*arguments: str) -> None:
    processes.run(sys.executable, "-m", "pip", *arguments, check=True)


def _run(installed: Path, folder: Path, *command: str) -> Completed:
    """`python -m …` of the installed package in `folder`."""
    return processes.run(sys.executable, "-m", *command, cwd=folder, env=processes.environment(PYTHONPATH=str(installed)))


def test_holds_every_file_of_the_packages(installed: Path) -> None:
    """Templates, the marker of types and whatever else is not Python: setuptools takes only what pyproject.toml names."""

    def files(root: Path) -> set[Path]:
        paths = [path for package in ("clae_dist", "data_prep") for path in (root / package).rglob("*") if path.is_file()]
        return {path.relative_to(root) for path in paths if path.suffix not in (".pyc", ".md")}

    assert files(ROOT) - files(installed) == set()


def test_holds_the_recipes(installed: Path, tmp_path: Path) -> None:
    names = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    recipes = installed / "clae_dist" / "recipes"
    assert names == {path.relative_to(recipes) for path in recipes.rglob("*.yaml")}
    result = _run(installed, tmp_path, "clae_dist", "config", "cifar10/clae")
    assert result.returncode == 0, result.stderr
    assert "image_size: 32  # " in result.stdout
    assert str(installed) in result.stdout  # the origin of a value


def test_says_how_to_prepare_the_quickstarts_images(installed: Path, tmp_path: Path) -> None:
    result = _run(installed, tmp_path, "clae_dist", "train", "quickstart", "launch.launcher=local")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "name a folder of shards, such as data.shards=shards after `python -m data_prep demo shards`" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_trains_the_quickstart(installed: Path, tmp_path: Path) -> None:
    """Images from a folder, prepared and trained on with the installed package alone."""
    from PIL import Image

    images = tmp_path / "images"
    for number in range(300):
        path = images / str(number % 3) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number % 256, 40 * (number % 3), 90)).save(path)
    prepared = _run(installed, tmp_path, "data_prep", "demo", "shards", "--data", "images")
    assert prepared.returncode == 0, prepared.stderr
    small = ("batch.global_size=32", "train.epochs=0.1", "launch.launcher=local", "launch.workers=1", "tracking.name=none")
    trained = _run(installed, tmp_path, "clae_dist", "train", "quickstart", "data.shards=shards", *small)
    assert trained.returncode == 0, trained.stderr
    assert "saved in runs/quickstart" in trained.stdout


def test_holds_the_templates_of_pages(installed: Path, tmp_path: Path) -> None:
    code = "from clae_dist.page import _environment as e; [e('data_prep').get_template(n) for n in ('run.html', 'audit.html')]"
    environment = processes.environment(PYTHONPATH=str(installed))
    result = processes.run(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
