"""launch/env.sh for real, with a project that needs no packages: a few seconds an environment instead of minutes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.processes import ROOT, Process

PROJECT = '[project]\nrequires-python = ">=3.11"\ndependencies = {}\noptional-dependencies = {{}}\n'

# What `clae` runs here: says where it stands, and what a process sees that multiprocessing spawns.
COMMAND = """
import multiprocessing, sys

def double(x):
    return 2 * x

def run():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("clae", sys.argv[1:], pool.map(double, [21]))
    sys.exit(7)
"""


def clean_environment() -> dict[str, str]:
    """Ours, without what points to this checkout (launch/test.sh sets PYTHONPATH) or tells pip and env.sh what to do."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "CLAE_"))}


class Checkout:
    """A folder with launch/env.sh and a project file; both it and the cache have spaces in their paths."""

    def __init__(self, home: Path) -> None:
        self.folder, self.cache = home / "a check out", home / "the cache"
        (self.folder / "launch").mkdir(parents=True)
        (self.folder / "clae_dist").mkdir()
        (self.folder / "clae_dist" / "__init__.py").touch()
        (self.folder / "clae_dist" / "cli.py").write_text(COMMAND)
        shutil.copy(ROOT / "launch" / "env.sh", self.folder / "launch")
        self.asks_for([])

    def asks_for(self, dependencies: list[str]) -> None:
        (self.folder / "pyproject.toml").write_text(PROJECT.format(dependencies))

    def start(self, **environment: str) -> Process:
        ours = {"CLAE_CACHE": str(self.cache), "CLAE_PYTHON": sys.executable, "CLAE_FREE_GB": "0", "PIP_NO_INDEX": "1"}
        script = self.folder / "launch" / "env.sh"
        return processes.popen(script, env={**clean_environment(), **ours, **environment}, stderr=subprocess.PIPE)

    def run(self, **environment: str) -> tuple[int, str, str]:
        process = self.start(**environment)
        out, err = process.communicate(timeout=200)
        return process.returncode, out, err


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.slow
def test_two_at_once_make_one_environment_whose_clae_works_anywhere(checkout: Checkout, tmp_path: Path) -> None:
    both = [checkout.start() for _ in range(2)]
    ended: list[Any] = [process.communicate(timeout=200) for process in both]
    said = sorted((err for _, err in ended), key=lambda err: "installing:" in err)
    assert [process.returncode for process in both] == [0, 0], said
    assert "installing:" in said[1]
    assert "installing:" not in said[0]
    assert "env: using" in said[0]
    env = Path(ended[0][0].splitlines()[-1])
    assert env.is_relative_to(checkout.cache)
    assert ended[0][0] == ended[1][0] == f"{env}\n"
    for folder in (checkout.folder, tmp_path):  # in a checkout, and elsewhere
        done = processes.run(env / "bin" / "clae", "a b", "$HOME", cwd=folder, env=clean_environment())
        assert (done.returncode, done.stdout) == (7, "clae ['a b', '$HOME'] [42]\n"), done.stderr


@pytest.mark.slow
def test_an_install_that_was_killed_is_started_over_without_a_network(checkout: Checkout) -> None:
    no_network = {"PIP_NO_INDEX": "", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    first = checkout.start()
    assert first.stderr is not None
    for line in first.stderr:
        if "installing:" in line:  # at least a second before it is complete
            break
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=100)
    (env,) = checkout.cache.glob("env-*[0-9a-f]")
    assert not (env / ".complete").exists()
    (env / "half").touch()
    code, out, err = checkout.run(**no_network)
    assert code == 0, err
    assert "creating" in err
    assert out == f"{env}\n"
    assert (env / ".complete").exists()
    assert not (env / "half").exists()
    assert "using" in checkout.run(**no_network)[2]


@pytest.mark.slow
def test_what_pip_cannot_install_is_told_and_not_taken_for_an_environment(checkout: Checkout) -> None:
    checkout.asks_for(["a-package-of-nobody"])
    code, out, err = checkout.run()
    assert (code, out) == (1, "")
    assert "No matching distribution found for a-package-of-nobody" in err
    assert "env: pip failed (log: " in err
    assert not list(checkout.cache.glob("*/.complete"))


def test_other_dependencies_are_another_environment_and_a_full_disk_is_told_first(checkout: Checkout) -> None:
    made = []
    for dependencies in ([], ["pip"]):
        checkout.asks_for(dependencies)
        code, out, err = checkout.run(CLAE_FREE_GB="99000000")
        assert (code, out) == (1, "")
        assert "GB free and the install needs 99000000; free some or set CLAE_CACHE to another disk." in err
        made.append(err.split("creating ")[1].split(" with ")[0])
    assert made[0] != made[1]
    assert not any(Path(path).exists() for path in made)
