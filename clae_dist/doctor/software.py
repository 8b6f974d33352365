"""Check Python and the packages: version, and for a missing one its use."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from clae_dist.doctor.finding import Finding
from clae_dist.versions import package_version


@dataclass(frozen=True)
class Package:
    name: str
    oldest: tuple[int, int]
    needed_for: str
    required: bool = True


PACKAGES = (
    Package("torch", (2, 9), "everything"),
    Package("torchvision", (0, 24), "decoding, augmentation and the torchvision/… encoders"),
    Package("timm", (1, 0), "the timm/… encoders"),
    Package("webdataset", (1, 0), "preparing shards"),
    Package("pillow", (10, 3), "decoding what is not plain JPEG"),
    Package("safetensors", (0, 4), "exporting the encoder"),
    Package("scikit-learn", (1, 4), "the quickstart without a network", required=False),
    Package("matplotlib", (3, 8), "the report"),
    Package("ray", (2, 60), "--launcher ray; torchrun and local work without", required=False),
    Package("mlflow", (3, 5), "tracking.name mlflow; tracking.name=none works without", required=False),
    Package("psutil", (5, 9), "system metrics in MLflow", required=False),
)


def python() -> Iterator[Finding]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    yield Finding("ok", "python", found)


def packages() -> Iterator[Finding]:
    for package in PACKAGES:
        version, oldest = package_version(package.name), ".".join(map(str, package.oldest))
        if not version:
            level: Literal["warning", "problem"] = "problem" if package.required else "warning"
            advice = f"needed for {package.needed_for}; pip install '{package.name}>={oldest}'."
            yield Finding(level, package.name, "not installed", advice)
        elif _numbers(version) < package.oldest:
            yield Finding("warning", package.name, version, f"tested from {oldest} on; pip install -U {package.name}.")
        else:
            yield Finding("ok", package.name, version)
    yield from _import_check("torch", "torchvision")


def _import_check(*modules: str) -> Iterator[Finding]:
    """Import the modules: a torchvision built for another torch installs without error and fails here."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Finding(
                "problem", name, f"cannot be imported ({text})", "install torch and torchvision of one release from one index."
            )


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
