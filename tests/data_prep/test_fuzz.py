"""Archives and files damaged at random: an error, or every image written or set aside. Never a crash or a silent loss."""

from __future__ import annotations

import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clae_dist.data.decode import DecodeError, decode_rgb
from clae_dist.errors import DataError
from data_prep.image import checked
from data_prep.settings import PrepareSettings
from tests.data_prep.published import WNIDS, make_imagenet, make_parquet, make_zip

NUM_IMAGES = 9


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Cut short, a byte changed, bytes removed, or a stretch of it from elsewhere."""
    at, length = rng.randrange(len(data)), rng.randrange(1, 600)
    start = rng.randrange(len(data))
    return rng.choice(
        (
            data[:at],
            data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
            data[:at] + data[at + length :],
            data[:at] + data[start : start + length] + data[at + length :],
        )
    )


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("mutations", [250, pytest.param(1000, marks=pytest.mark.slow)])
def test_an_image_that_passes_can_be_decoded(encoded: Any, format: str, mutations: int) -> None:
    """Guards against an image that stops training because the check and the decoder disagree."""
    whole, passed = encoded(0, format), 0
    settings = PrepareSettings("set", "made here", max_pixels=10**6)
    smaller = PrepareSettings("set", "made here", max_pixels=10**6, resize_short=4, quality=90)
    for seed in range(mutations):
        data = mutate(whole, random.Random(f"{format} {seed}"))
        try:
            kept, _ = checked(data, settings)
        except DecodeError:
            with pytest.raises(DecodeError):
                checked(data, smaller)
        else:
            passed += 1
            assert decode_rgb(kept).shape[0] == 3
            assert min(decode_rgb(checked(data, smaller)[0]).shape[1:]) <= 4
    assert 0 < passed < mutations


@pytest.fixture
def make_file(tmp_path: Path, make_folder: Any, archive: Any, encoded: Any) -> Callable[[str], Path]:
    """make_file(kind): nine images in one file."""

    def make(kind: str) -> Path:
        images = [encoded(seed) for seed in range(NUM_IMAGES)]
        if kind == "imagenet":
            groups = {wnid: images[3 * number : 3 * number + 3] for number, wnid in enumerate(WNIDS)}
            return make_imagenet(tmp_path / "ilsvrc", groups, [])["train"]
        if kind == "parquet":
            return make_parquet(tmp_path / "a.parquet", list(images), [0, 1, 2] * 3, group=4)
        folder = make_folder({"cat": 3, "dog": 3, "owl": 3})
        if kind.startswith("zip"):
            return make_zip(folder, tmp_path / "a.zip", zipfile.ZIP_STORED if "stored" in kind else zipfile.ZIP_DEFLATED)
        made: Path = archive(folder, tmp_path / f"a.{kind}", "w:gz" if kind.endswith("gz") else "w")
        return made

    return make


@pytest.mark.parametrize("mutations", [30, pytest.param(500, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip", "zip stored", "imagenet", "parquet"])
def test_damage_is_an_error_or_named(tmp_path: Path, make_file: Any, run: Any, kind: str, mutations: int) -> None:
    path = make_file(kind)
    whole = path.read_bytes()
    before, refused = sorted(os.listdir(tmp_path)), 0
    for seed in range(mutations):
        said: list[str] = []
        path.write_bytes(mutate(whole, random.Random(f"{kind} {seed}")))
        folder = tmp_path / f"dst-{seed}"
        try:
            manifest = run(path, folder, max_bad=1, test_share=0, say=said.append)
        except DataError:
            refused += 1
        else:
            found = manifest.num_samples("train") + manifest.quarantined
            assert found == NUM_IMAGES or "were skipped" in " ".join(said), seed  # a name that is no image's any more
    assert 0 < refused < mutations or kind == "tar.gz"  # whose checksum refuses nearly all
    left = {name for name in os.listdir(tmp_path) if not name.startswith("dst-")}
    assert sorted(left) == before
