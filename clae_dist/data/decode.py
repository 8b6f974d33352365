"""Decode images to RGB pixels, and check them for data_prep.

`inspect` and `decode_rgb` share their path through Pillow, so that an image that passes the check can be decoded. `decode_rgb`
uses torchvision's decoder for plain JPEGs, which is faster, and falls back to Pillow if that decoder refuses. `inspect` needs
no torch (whose import takes seconds), so torch is imported only where pixels become tensors.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from clae_dist.data.pixels import UnreadablePixelsError, to_rgb, why_unidentified

if TYPE_CHECKING:
    import torch

# Pillow refuses images above twice its MAX_IMAGE_PIXELS by itself; more cannot be asked for.
PILLOW_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0) or 2**31
_ORIENTATION = 0x0112  # EXIF tag; 1: upright, 2 to 8: mirrored or turned
_TRANSPOSES = {  # by EXIF orientation: the operation that sets an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The supported formats. Others that Pillow reads start programs (EPS) or do not hold images of data sets.
_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tiff",
    "PPM": "ppm",
    "AVIF": "avif",
    "JPEG2000": "jp2",
}


class DecodeError(ValueError):
    """An undecodable image; the message is the reason."""


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`. `problem` is empty for a decodable image; the other fields are valid only then."""

    problem: str
    extension: str = ""  # by the content, not by a file's name: jpg, png, …
    width: int = 0  # pixels, as stored (before the EXIF orientation)
    height: int = 0


def inspect(data: bytes, max_pixels: float = 100e6) -> Inspection:
    """Decode an image completely and report a problem, if any. Never raises for bad bytes."""
    try:
        with warnings.catch_warnings(action="ignore"):  # only the pixels matter
            return _inspect(data, max_pixels)
    except DecodeError as error:
        return Inspection(problem=str(error))


def upright_rgb(data: bytes, max_pixels: float = 100e6) -> Image.Image:
    """A PIL image in RGB, with the checks of `inspect` and the rules of `decode_rgb`. Raises DecodeError."""
    with warnings.catch_warnings(action="ignore"):
        image = _open(data)
        _check_pixels(image, max_pixels)
        pixels = _rgb(image)
        turn = _TRANSPOSES.get(_orientation(image))
        return pixels if turn is None else pixels.transpose(turn)


def stored_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image, by its header alone: no pixel is decoded. Raises DecodeError."""
    with warnings.catch_warnings(action="ignore"):
        return _open(data).size


def _inspect(data: bytes, max_pixels: float) -> Inspection:
    image = _open(data)
    _check_pixels(image, max_pixels)
    _rgb(image)
    _orientation(image)
    return Inspection("", _EXTENSIONS[image.format or ""], *image.size)


def _check_pixels(image: Image.Image, max_pixels: float) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DecodeError(
            f"{width}x{height} is {width * height / 1e6:.1f} million pixels, above --max-pixels {max_pixels / 1e6:g} million"
        )


def decode_rgb(data: bytes | memoryview) -> torch.Tensor:
    """uint8 (3, H, W), RGB, of one encoded image.

    EXIF orientation is applied; grey, palette and CMYK are converted; 16 bits per channel become 8; transparency becomes white;
    of an animation, the first frame is used. Colour profiles are not applied. The strides are channels last, as decoders write
    them. Raises DecodeError with the reason.
    """
    frame = _plain_jpeg_frame(data)
    # Only an APP1 segment (EXIF, XMP) can have an orientation; without one, the header need not be parsed again.
    upright = frame > 0 and b"\xff\xe1" not in bytes(data[2:frame])
    pixels = _decode_jpeg(data) if frame else None
    if pixels is not None and upright:
        return pixels
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of odd metadata
        image = _open(data)
        return pixels_of(image) if pixels is None else _turn(pixels, _orientation(image))


def pixels_of(image: Image.Image) -> torch.Tensor:
    """uint8 (3, H, W), RGB, of a PIL image, by the rules of `decode_rgb`. Raises DecodeError with the reason."""
    import torch

    pixels = torch.from_numpy(np.array(_rgb(image))).permute(2, 0, 1)
    return _turn(pixels, _orientation(image))


def _open(data: bytes | memoryview) -> ImageFile.ImageFile:
    """Open the image and read its header, not its pixels. Raises DecodeError."""
    if not data:
        raise DecodeError("the file is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        reason = why_unidentified(data, _formats())
        if reason:
            raise DecodeError(f"cannot be read as {reason}") from None
        raise DecodeError("not an image of a format that is read (JPEG, PNG, WebP, GIF, BMP, TIFF, …)") from None
    except Image.DecompressionBombError:
        raise DecodeError(
            f"above {PILLOW_MAX_PIXELS / 1e6:.0f} million pixels, Pillow's limit against decompression bombs"
        ) from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, … for damaged headers
        raise DecodeError(f"header cannot be read: {error or type(error).__name__}") from error


@functools.cache
def _formats() -> list[str]:
    """The formats that this build of Pillow supports: AVIF is optional."""
    Image.init()
    return [name for name in _EXTENSIONS if name in Image.OPEN]


def _rgb(image: Image.Image) -> Image.Image:
    """Decode the pixels completely, as 8-bit RGB. Raises DecodeError."""
    try:
        return to_rgb(image)
    except UnreadablePixelsError as error:
        raise DecodeError(str(error)) from None
    except Exception as error:  # as in _open: each of Pillow's decoders has errors of its own
        raise DecodeError(f"cannot be decoded: {error or type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8. Raises DecodeError for EXIF data that Pillow cannot parse."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # struct.error, SyntaxError, … by what is damaged
        raise DecodeError(f"EXIF data cannot be read: {error or type(error).__name__}") from error
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """(3, H, W) set upright; the numbers are EXIF's (JEITA CP-3451, tag 274)."""
    if orientation >= 5:  # 5 to 8: rows and columns swapped
        pixels = pixels.transpose(1, 2)
    dims = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    return pixels.flip(dims) if dims else pixels


def _plain_jpeg_frame(data: bytes | memoryview) -> int:
    """Offset of the frame header of an 8-bit JPEG of one or three components (not CMYK); 0 for anything else."""
    if data[:2] != b"\xff\xd8":
        return 0
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            if data[at + 4] != 8 or data[at + 9] not in (1, 3):
                return 0
            height, width = (int.from_bytes(data[at + place : at + place + 2], "big") for place in (5, 7))
            if height * width > PILLOW_MAX_PIXELS:  # torchvision's decoder would take the memory for it
                raise DecodeError(f"{width}x{height} is above {PILLOW_MAX_PIXELS / 1e6:.0f} million pixels")
            return at
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0


def _decode_jpeg(data: bytes | memoryview) -> torch.Tensor | None:
    """uint8 (3, H, W) from torchvision's decoder, without orientation; None if it refuses or does not exist."""
    decoder = torchvision_decoder()
    if decoder is None:
        return None
    try:
        return decoder(as_tensor(data))
    except RuntimeError:  # Pillow tries next, and decodes it or raises the reason
        return None


def as_tensor(data: bytes | memoryview) -> torch.Tensor:
    """uint8 (len(data),) over these very bytes, which are not copied and must not be written to; `data` is not empty."""
    return _frombuffer()(data)


@functools.cache
def _frombuffer() -> Callable[[bytes | memoryview], torch.Tensor]:
    """Trigger torch's warning about a read-only buffer, which it prints once per process.

    (A private, writable mapping would need no such care, but counts as memory where the kernel does not overcommit.)
    """
    import torch

    with warnings.catch_warnings(action="ignore"):
        torch.frombuffer(b"0", dtype=torch.uint8)
    return lambda data: torch.frombuffer(data, dtype=torch.uint8)


@functools.cache
def torchvision_decoder() -> Callable[[torch.Tensor], torch.Tensor] | None:
    import torch

    try:
        from torchvision.io import ImageReadMode

        # The Python wrapper of it warns with every call, which takes a third of the time of a small image.
        decode = torch.ops.image.decode_jpeg
    except (ImportError, AttributeError):  # a torchvision without decoders: Pillow does it all
        return None
    return lambda data: decode(data, ImageReadMode.RGB.value, False)
