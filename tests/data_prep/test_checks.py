"""What is done with an image on its way into a shard: thresholds, and --resize."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clae_dist.data.decode import DecodeError, decode_rgb, inspect
from clae_dist.data.manifest import Manifest
from clae_dist.errors import DataError
from data_prep.__main__ import main
from data_prep.image import checked
from data_prep.settings import PrepareSettings

Run = Callable[..., Manifest]


def settings(**changes: Any) -> PrepareSettings:
    return PrepareSettings("set", "made here", **{"resize_short": 32, "quality": 90, **changes})


def encode(pixels: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **options)
    return stream.getvalue()


def gradient(width: int, height: int) -> np.ndarray:
    """uint8 (height, width, 3), red from left to right, green from top to bottom."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([red, green, np.full_like(red, 128)], -1).round().astype(np.uint8)


@pytest.mark.parametrize(
    "size, expected", [((200, 100), (64, 32)), ((100, 301), (32, 96)), ((32, 50), (32, 50)), ((29, 27), (29, 27))]
)
def test_the_shorter_side_is_made_that_long_and_never_longer(size: tuple[int, int], expected: tuple[int, int]) -> None:
    data, extension = checked(encode(gradient(*size)), settings())
    assert extension == "jpg"
    found = inspect(data)
    assert (found.extension, found.width, found.height) == ("jpg", *expected)
    error = np.abs(decode_rgb(data).permute(1, 2, 0).numpy().astype(int) - gradient(*expected))
    assert error.max() <= 12  # what JPEG of quality 90 does to slopes


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_result_is_upright_and_says_nothing_of_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(gradient(64, 40), "JPEG", quality=95, exif=exif, comment=b"by me", icc_profile=b"profile" * 10)
    made, _ = checked(data, settings(resize_short=40))
    for marker in (b"\xff\xe1", b"\xff\xe2", b"\xff\xfe"):  # EXIF, colour profile, comment
        assert marker not in made
    error = decode_rgb(made).int() - decode_rgb(data).int()
    assert error.abs().float().mean() < 2


def test_it_is_antialiased() -> None:
    """Guards against point sampling: of lines one pixel wide nothing but grey may be left."""
    lines = np.zeros((256, 256, 3), np.uint8)
    lines[:, ::2] = 255
    data, _ = checked(encode(lines), settings())
    pixels = decode_rgb(data)[:, :, 2:-2]
    assert 120 <= pixels.min() <= pixels.max() <= 135


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image of a format that is read"),
        (encode(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))[:300], "truncated"),
        (encode(gradient(40, 40)), "above --max-pixels"),
        (encode(gradient(30, 5)), "30x5 has a side below --min-side 10"),
    ],
)
@pytest.mark.parametrize("resized", [True, False])
def test_the_same_is_set_aside_whether_or_not_images_are_resized(data: bytes, reason: str, resized: bool) -> None:
    limits: dict[str, Any] = {"max_pixels": 1000, "min_side": 10}
    with pytest.raises(DecodeError, match=reason):
        checked(data, settings(**limits) if resized else settings(**limits, resize_short=0, quality=0))


def test_resized_shards_say_so_and_are_the_same_every_time(tmp_path: Path, make_folder: Any, run: Run, content: Any) -> None:
    source = make_folder({"cat": 6, "dog": 6})
    how = {"resize_short": 4, "quality": 80}
    first = run(source, tmp_path / "a", **how)
    assert first.preparation["pixels"] == "JPEG of quality 80, shorter side at most 4, from original encoded bytes"
    assert (first.preparation["resize_short"], first.preparation["quality"]) == (4, 80)
    assert run(source, tmp_path / "b", num_workers=1, **how).digest == first.digest
    assert content(tmp_path / "a") == content(tmp_path / "b")
    shard = first.splits["train"][0]
    offset, size, _ = first.index(shard)[0].tolist()
    assert decode_rgb((tmp_path / "a" / shard.name).read_bytes()[offset : offset + size]).shape == (3, 4, 6)


def test_the_options_of_the_command_line(tmp_path: Path, make_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_folder({"cat": 6, "dog": 6})
    (source / "cat" / "flat.png").write_bytes(encode(gradient(50, 3)))
    words = ["prepare", str(source), str(tmp_path / "dst"), "--workers", "0"]
    assert main([*words, "--quality", "80"]) == 2
    assert "--quality is 80; without --resize the images' bytes are kept" in capsys.readouterr().err
    assert main([*words, "--resize", "short=4", "--quality", "96"]) == 2
    assert "--quality is 96; use 1 to 95" in capsys.readouterr().err
    assert main([*words, "--resize", "short=4", "--min-side", "8", "--max-bad", "10%"]) == 0
    manifest = json.loads((tmp_path / "dst" / "manifest.json").read_text())
    assert manifest["preparation"]["quality"] == 90
    assert manifest["preparation"]["min_side"] == 8
    assert manifest["quarantined"] == 1


def test_a_folder_of_an_older_version_goes_on(tmp_path: Path, make_folder: Any, run: Run) -> None:
    """plan.json of a version that knew no --resize: what it did not ask is at its default."""
    source = make_folder({"cat": 6, "dog": 6})
    run(source, tmp_path / "dst")
    path = tmp_path / "dst" / "plan.json"
    plan = json.loads(path.read_text())
    for key in ("min_side", "resize_short", "quality"):
        del plan["settings"][key]
    path.write_text(json.dumps(plan))
    run(source, tmp_path / "dst")
    with pytest.raises(DataError, match="min_side was 0, now 3"):
        run(source, tmp_path / "dst", min_side=3)
