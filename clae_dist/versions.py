"""Versions of packages, and those that must be equal on all hosts of a run."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from clae_dist import __version__


def package_version(package: str) -> str:
    """The version of an installed package, "" if it is not installed. The package is not imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def git_revision() -> str:
    """The commit of the checkout, with "+changes" if the working tree is dirty; "" outside a checkout."""
    here = Path(__file__).parents[1]
    try:
        if not (here / ".git").exists():
            return ""
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return revision + ("+changes" if dirty else "")


def host_versions() -> dict[str, str]:
    """This host's versions, by name; "none" for a package that is not installed."""
    return {
        "Python": platform.python_version(),
        "torch": package_version("torch") or "none",
        "Ray": package_version("ray") or "none",
        "clae-dist": __version__,
        "git revision": git_revision() or "none",
    }


def differences(here: dict[str, str], there: dict[str, str], here_name: str, there_name: str) -> str:
    """The differences between two hosts: "torch is 2.11 on host1, but 2.15 on host0; …"; "" without any.

    Python is compared without its patch release.
    """

    def told(name: str, value: str) -> str:
        return value.rpartition(".")[0] if name == "Python" else value

    return "; ".join(
        f"{name} is {here.get(name, 'none')} on {here_name}, but {there.get(name, 'none')} on {there_name}"
        for name in here | there
        if told(name, here.get(name, "none")) != told(name, there.get(name, "none"))
    )
