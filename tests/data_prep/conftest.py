"""Images made on the spot, folders and archives of them, and the command line in a process of its own."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clae_dist.data.manifest import Manifest
from data_prep.prepare import prepare
from data_prep.settings import PrepareSettings
from data_prep.sources import open_source
from tests import processes
from tests.processes import Completed


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """encoded(seed, format="JPEG", **options): bytes of a small image that no other seed gives."""

    def encode(seed: int, format: str = "JPEG", **options: Any) -> bytes:
        stream = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
        Image.fromarray(pixels).save(stream, format, **options)
        return stream.getvalue()

    return encode


@pytest.fixture
def make_folder(tmp_path: Path, encoded: Callable[..., bytes]) -> Callable[..., Path]:
    """make_folder({"cat": 3, "dog": 2}, name="src"): a folder of JPEGs, cat/0000.jpg …; 0 makes an empty folder."""

    def make(counts: dict[str, int], name: str = "src") -> Path:
        root = tmp_path / name
        seed = 0
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                (root / folder / f"{number:04d}.jpg").write_bytes(encoded(seed))
                seed += 1
        return root

    return make


@pytest.fixture
def archive() -> Callable[..., Path]:
    """archive(folder, path, mode="w:gz"): a tar of what is in the folder, names without a leading folder."""

    def make(folder: Path, path: Path, mode: str = "w:gz") -> Path:
        with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
            for item in sorted(folder.iterdir()):
                tar.add(item, item.name)
        return path

    return make


@pytest.fixture
def run() -> Callable[..., Manifest]:
    """run(source, destination, **settings): prepares in this process; max_bad, num_workers and say as `prepare` has them.

    `source` is a path, several, or a Source.
    """

    def prepared(source: Any, destination: Path, **options: Any) -> Manifest:
        how = {key: options.pop(key) for key in ("max_bad", "num_workers", "say") if key in options}
        settings = PrepareSettings(**{"name": "set", "source": "made here", **options})
        paths = [source] if isinstance(source, Path) else source
        opened = open_source(paths) if isinstance(paths, list) else source
        return prepare(opened, destination, settings, **{"num_workers": 0, "say": lambda _: None, **how})

    return prepared


@pytest.fixture
def command() -> Callable[..., Completed]:
    """command(*arguments, script=None): `python -m data_prep …`, or a script, in a process group of its own."""

    def call(*arguments: object, script: Path | None = None, **environment: str) -> Completed:
        start = [str(script)] if script else ["-m", "data_prep"]
        clean = processes.environment()
        for name in ("CLAE_DATA", "CLAE_CACHE", "XDG_CACHE_HOME"):
            clean.pop(name, None)
        # communicate() returns when the last process that holds the pipes is gone: workers left behind would be a timeout.
        return processes.run(sys.executable, *start, *arguments, env={**clean, **environment}, start_new_session=True)

    return call


@pytest.fixture
def content() -> Callable[[Path], dict[str, bytes]]:
    """content(folder): the bytes of all shards and indexes by name."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for pattern in ("*.tar", "*.npy") for path in folder.glob(pattern)}

    return read
