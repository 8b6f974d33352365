"""Decoding: every kind of image becomes the same kind of tensor, and what the check passes can be decoded."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from clae_dist.data.decode import PILLOW_MAX_PIXELS, DecodeError, decode_rgb, inspect
from tests import processes


def picture(width: int = 48, height: int = 32, mode: str = "RGB") -> Image.Image:
    """A smooth image without symmetry, so that any turn of it is seen."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([255 * x, 255 * y, 255 * x * (1 - y)], axis=2).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def as_array(data: bytes) -> np.ndarray:
    """(H, W, 3) int64 of `decode_rgb`."""
    pixels = decode_rgb(data)
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3
    return pixels.permute(1, 2, 0).numpy().astype(np.int64)


def png(width: int, height: int, depth: int = 1, colour: int = 0) -> bytes:
    """A PNG of a few bytes whose header claims any size; its pixels are missing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def with_pages(format: str) -> bytes:
    first, second = picture(), ImageOps.mirror(picture())
    return encode(
        first, format, save_all=True, append_images=[second], duration=50, **({"lossless": True} if format == "WEBP" else {})
    )


def with_palette_alpha() -> Image.Image:
    image = picture().quantize(16)
    image.info["transparency"] = bytes([0, 128] + [255] * 14)
    return image


ODD: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(picture(), "JPEG"),
    "progressive jpeg": lambda: encode(picture(), "JPEG", progressive=True),
    "grey jpeg": lambda: encode(picture(mode="L"), "JPEG"),
    "cmyk jpeg": lambda: encode(picture(mode="CMYK"), "JPEG"),
    "jpeg with trailing bytes": lambda: encode(picture(), "JPEG") + b"\0" * 100,
    "jpeg with damaged exif": lambda: encode(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff" + bytes(range(200))),
    "png": lambda: encode(picture(), "PNG"),
    "grey png": lambda: encode(picture(mode="L"), "PNG"),
    "1-bit png": lambda: encode(picture(mode="1"), "PNG"),
    "rgba png": lambda: encode(picture(mode="RGBA"), "PNG"),
    "grey png with alpha": lambda: encode(picture(mode="LA"), "PNG"),
    "palette png with alpha": lambda: encode(
        with_palette_alpha(), "PNG", transparency=with_palette_alpha().info["transparency"]
    ),
    "rgb png with a transparent colour": lambda: encode(picture(), "PNG", transparency=(0, 0, 0)),
    "16-bit png": lambda: encode(Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64), "PNG"),
    "16-bit tiff": lambda: encode(Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64), "TIFF"),
    "float tiff": lambda: encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
    "animated gif": lambda: with_pages("GIF"),
    "animated webp": lambda: with_pages("WEBP"),
    "gif": lambda: encode(picture(), "GIF"),
    "webp": lambda: encode(picture(), "WEBP"),
    "bmp": lambda: encode(picture(), "BMP"),
    "1x1": lambda: encode(picture(1, 1), "JPEG"),
    "text": lambda: b"no image at all",
    "empty": lambda: b"",
    "only a jpeg's first bytes": lambda: b"\xff\xd8\xff\xe0",
    "bomb": lambda: png(12_000, 12_000),
    "larger bomb": lambda: png(60_000, 60_000),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_passes_the_check_can_be_decoded(kind: str) -> None:
    """Guards against an image that is in a shard and stops training a day later."""
    data = ODD[kind]()
    found = inspect(data)
    if found.problem:
        with pytest.raises(DecodeError):
            decode_rgb(data)
    else:
        assert decode_rgb(data).shape == (3, found.height, found.width)


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "png", "gif", "webp", "16-bit png", "bmp"])
def test_cut_anywhere_the_check_and_the_decoder_agree(kind: str) -> None:
    data = ODD[kind]()
    for length in {0, 1, 2, 10, *range(0, len(data) - 40, max(1, len(data) // 25))}:
        assert inspect(data[:length]).problem, f"{kind} cut to {length} of {len(data)} bytes passes"
    for length in range(len(data) - 40, len(data)):  # an end marker alone may be missing: then there is nothing to miss
        if not inspect(data[:length]).problem:
            decode_rgb(data[:length])


@pytest.mark.parametrize("kind", ["text", "empty", "only a jpeg's first bytes", "float tiff", "bomb", "larger bomb"])
def test_bad_bytes_are_named(kind: str) -> None:
    expected = {
        "text": "not an image",
        "empty": "0 bytes",
        "only a jpeg's first bytes": "cannot be read as JPEG",
        "float tiff": "no agreed range",
        "bomb": "12000x12000 is 144.0 million pixels, above --max-pixels 100 million",
        "larger bomb": "Pillow's limit",
    }
    problem = inspect(ODD[kind]()).problem
    assert any(text in problem for text in expected[kind].split("|")), problem


def test_the_limit_on_pixels_is_the_users() -> None:
    data = encode(picture(), "PNG")
    assert inspect(data, max_pixels=48 * 32).problem == ""
    assert "above --max-pixels" in inspect(data, max_pixels=48 * 32 - 1).problem
    assert PILLOW_MAX_PIXELS > 100e6


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), format, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(np.int64)
    assert as_array(data).shape == upright.shape
    assert np.abs(as_array(data) - upright).max() <= 2  # two builds of libjpeg may round differently


def test_jpegs_are_as_pillow_decodes_them() -> None:
    for kind in ("jpeg", "grey jpeg", "progressive jpeg", "cmyk jpeg"):
        data = ODD[kind]()
        pillow = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)
        assert np.abs(as_array(data) - pillow).max() <= 2, kind  # two builds of libjpeg may round differently


def test_where_torchvision_refuses_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(), "JPEG")
    expected = as_array(data)
    monkeypatch.setattr("clae_dist.data.decode.torchvision_decoder", lambda: None)
    assert np.abs(as_array(data) - expected).max() <= 2  # two builds of libjpeg may round differently


def test_sixteen_bits_become_eight() -> None:
    wide = np.array([[0, 128, 129, 257, 32768, 65534, 65535]], np.uint16)
    for format in ("PNG", "TIFF"):
        found = as_array(encode(Image.fromarray(wide), format))
        assert found[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]
        assert (found[..., 0] == found[..., 2]).all()


def test_transparency_is_laid_on_white() -> None:
    pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [0, 0, 0, 128]]], np.uint8)
    found = as_array(encode(Image.fromarray(pixels), "PNG"))
    assert found[0, 0].tolist() == [200, 100, 0]
    assert found[0, 1].tolist() == [255, 255, 255]
    assert np.abs(found[0, 2] - 127).max() <= 1  # rounding of 255 * (1 - 128 / 255)
    palette = as_array(ODD["palette png with alpha"]())
    where = np.asarray(with_palette_alpha()) == 0
    assert where.any()
    assert (palette[where] == 255).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(format: str) -> None:
    first = np.asarray(picture()).astype(np.int64)
    found = as_array(with_pages(format))
    assert np.abs(found - first).mean() < 12  # GIF has 256 colours
    assert np.abs(found - first[:, ::-1]).mean() > 40


def test_the_check_does_not_import_torch() -> None:
    """Each worker of data_prep would otherwise wait for seconds."""
    code = "import sys, clae_dist.data.decode, clae_dist.data.manifest; sys.exit('torch' in sys.modules)"
    assert processes.run(sys.executable, "-c", code).returncode == 0


def test_a_header_that_claims_a_huge_image_is_refused_before_memory_is_taken() -> None:
    """torchvision's decoder would take gigabytes for a file of a kilobyte and call what comes an image."""
    data = bytearray(encode(picture(), "JPEG"))
    frame = data.find(b"\xff\xc0")
    data[frame + 5 : frame + 9] = (20000).to_bytes(2, "big") * 2
    with pytest.raises(DecodeError, match="20000x20000 is above"):
        decode_rgb(bytes(data))
    assert inspect(bytes(data)).problem
