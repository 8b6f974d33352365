from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clae_dist.data.manifest import Manifest
from tests.hosts.cluster import ROOT, Hosts, clean_environment
from tests.hosts.needs import require_hosts
from tests.hosts.small import LONG, settings, write_images, write_recipe


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Three hosts on one network."""
    require_hosts()
    with Hosts(3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_images(tmp_path_factory.mktemp("images") / "shards")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def train_here(recipe: Path, shards: Manifest, run_dir: Path, workers: int, *more: str) -> Path:
    """Trains with ranks of this machine, to the end; the run's folder."""
    overrides = settings(shards, run_dir, f"launch.workers={workers}", *more)
    command = [sys.executable, "-m", "clae_dist", "train", str(recipe), *overrides]
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, recipe: Path, shards: Manifest) -> Path:
    """The folder of a run with three ranks on one host that nothing disturbed."""
    return train_here(recipe, shards, tmp_path_factory.mktemp("three-ranks") / "run", 3)


@pytest.fixture(scope="session")
def undisturbed_long(tmp_path_factory: pytest.TempPathFactory, recipe: Path, shards: Manifest) -> Path:
    """The same with LONG's settings."""
    return train_here(recipe, shards, tmp_path_factory.mktemp("three-ranks-long") / "run", 3, *LONG)


@pytest.fixture(scope="session")
def undisturbed_two(tmp_path_factory: pytest.TempPathFactory, recipe: Path, shards: Manifest) -> Path:
    """The same with two ranks."""
    return train_here(recipe, shards, tmp_path_factory.mktemp("two-ranks") / "run", 2)
