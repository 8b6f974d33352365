"""Versions that must be equal on all hosts of a run: Python, torch, Ray and this package, with its git revision."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from clae_dist import __version__


def versions() -> dict[str, str]:
    """This host's versions, by name; "none" for what is not installed."""
    from clae_dist.runs.claim import git_revision

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    return {
        "Python": platform.python_version(),
        "torch": of("torch"),
        "Ray": of("ray"),
        "clae-dist": __version__,
        "git revision": git_revision() or "none",
    }


def differences(here: dict[str, str], there: dict[str, str], here_name: str, there_name: str) -> str:
    """The differences between two hosts: "torch is 2.11 on host1, but 2.15 on host0; …"; "" without any.

    Python counts without its patch release.
    """

    def told(name: str, value: str) -> str:
        return value.rpartition(".")[0] if name == "Python" else value

    return "; ".join(
        f"{name} is {here.get(name, 'none')} on {here_name}, but {there.get(name, 'none')} on {there_name}"
        for name in here | there
        if told(name, here.get(name, "none")) != told(name, there.get(name, "none"))
    )
