"""One image on its way into a shard: checked, and kept as it is or made smaller."""

from __future__ import annotations

import io

from PIL import Image

from clae_dist.data.decode import DecodeError, inspect, upright_rgb
from data_prep.settings import PrepareSettings

MAX_ENCODED_BYTES = 1_000_000_000  # an archive's directory can promise more than memory holds


def checked(data: bytes, settings: PrepareSettings) -> tuple[bytes, str]:
    """The bytes to be written and their extension. Raises DecodeError with the reason why an image is set aside."""
    if settings.resize_short:
        image = upright_rgb(data, settings.max_pixels)
        _check_side(image.size, settings.min_side)
        return _smaller_jpeg(image, settings), "jpg"
    found = inspect(data, settings.max_pixels)
    if found.problem:
        raise DecodeError(found.problem)
    _check_side((found.width, found.height), settings.min_side)
    return data, found.extension


def pixels_text(pixels: str, settings: PrepareSettings) -> str:
    """The manifest's description of the pixels; `pixels` is that of the source."""
    if not settings.resize_short:
        return pixels
    return f"JPEG of quality {settings.quality}, shorter side at most {settings.resize_short}, from {pixels}"


def _check_side(size: tuple[int, int], min_side: int) -> None:
    width, height = size
    if min(width, height) < min_side:
        raise DecodeError(f"{width}x{height} has a side below --min-side {min_side}")


def _smaller_jpeg(image: Image.Image, settings: PrepareSettings) -> bytes:
    """Never enlarged. Bicubic with support over all pixels that a new one covers (antialiased); no metadata is kept."""
    width, height = image.size
    scale = settings.resize_short / min(width, height)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=settings.quality, comment=b"")  # Pillow would keep a comment
    return stream.getvalue()
