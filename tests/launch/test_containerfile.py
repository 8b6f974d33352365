"""launch/Containerfile against pyproject.toml and the checkout; no image is built here."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "launch" / "Containerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """Every instruction with its arguments, lines that go on joined."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def arguments() -> dict[str, str]:
    return {name: value for kind, rest in instructions() if kind == "ARG" for name, _, value in [rest.partition("=")]}


def test_the_base_has_a_python_that_this_package_takes() -> None:
    """Both bases: the default, and the one for GPUs, whose Ubuntu has Python 3.12."""
    assert ("FROM", "${BASE}") in instructions()
    found = re.fullmatch(r"python:3\.(\d+)-slim-\w+", arguments()["BASE"])
    assert found
    oldest = int(re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])[1])  # type: ignore[index]
    newest = int(re.search(r"version_info < \(3, (\d+)\)", (ROOT / "launch" / "env.sh").read_text())[1]) - 1  # type: ignore[index]
    assert oldest <= int(found[1]) <= newest
    assert re.search(r"--build-arg BASE=nvidia/cuda:[\d.]+-devel-ubuntu24\.04 ", TEXT)


def test_it_copies_what_the_package_consists_of() -> None:
    copied = {source.rstrip("/") for kind, rest in instructions() if kind == "COPY" for source in rest.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == {"clae_dist", "data_prep"}
    assert copied == {*packages, "configs", "launch", "pyproject.toml", PROJECT["readme"]}


@pytest.mark.parametrize("extras", [arguments()["EXTRAS"], "ray", ""])
def test_it_installs_what_pyproject_asks_for(extras: str) -> None:
    (command,) = [rest for kind, rest in instructions() if kind == "RUN" and "tomllib" in rest]
    script = re.match(r"python -c '([^']+)' \"\$EXTRAS\"", command)
    assert script
    told = subprocess.run(
        [sys.executable, "-c", script[1], extras], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    wanted = [line for name in extras.split(",") if name for line in PROJECT["optional-dependencies"][name]]
    assert told == [*PROJECT["dependencies"], *wanted]


def test_its_commands_are_shell() -> None:
    commands = [rest for kind, rest in instructions() if kind == "RUN"]
    assert len(commands) == 3
    for command in commands:
        subprocess.run(["sh", "-n"], input=command, text=True, check=True)


def test_kuberay_runs_it_as_its_user() -> None:
    text = (ROOT / "launch" / "kuberay.yaml").read_text()
    assert "launch/Containerfile" in text
    (user,) = [rest for kind, rest in instructions() if kind == "USER"]
    cluster = list(yaml.safe_load_all(text))[1]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert str(group["template"]["spec"]["securityContext"]["runAsUser"]) == user
    assert "ray" in arguments()["EXTRAS"].split(",")
