"""Pixels of every depth, photometric interpretation and transparency that Pillow reads, as 8-bit RGB.

Pillow's own conversions treat 16-bit grey as 8-bit, do not invert 16-bit white-is-zero, compare a transparent colour of 2 or 16
bits with pixels of 8, and misread signed samples and 16-bit planes. Each case is corrected here, or refused with the reason:
32-bit and floating-point pixels have no agreed range.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

# TIFF's tags, and values of theirs.
_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR, _SAMPLE_FORMAT, _SUBSAMPLING = 258, 259, 262, 277, 284, 339, 530
_WHITE_IS_ZERO, _YCBCR = 0, 6
_SIGNED, _FLOAT = 2, 3
_NO_RANGE = "have no agreed range; store 8 or 16 bits a channel"


class UnreadablePixelsError(ValueError):
    """Pixels that cannot be made 8-bit RGB; the message is the reason."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode the pixels of an image in a file or in memory to 8-bit RGB, with transparency on white.

    Raises UnreadablePixelsError, and the errors of Pillow's decoders.
    """
    stored: object = ""
    if isinstance(image, ImageFile.ImageFile):  # of an image in memory, the depth in its file is not known
        if image.format == "TIFF":
            _refuse_tiff(image)
        if image.format == "JPEG2000" and not image.mode.startswith("I") and image.fp is not None:
            _refuse_deep_colour(image)
        stored = image.tile[0][3] if image.tile else ""  # a loaded image does not know
    image.load()
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):  # PPM's and older PNGs' are 16 bits
        return _from_16_bits(image)
    if mode in ("I", "F"):
        raise UnreadablePixelsError(f"{'floating-point' if mode == 'F' else '32-bit'} pixels {_NO_RANGE}")
    if image.format == "PNG" and "transparency" in image.info:
        _scale_transparency(image, stored)
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        seen = (image.convert("LA") if mode == "La" else image).convert("RGBA")  # Pillow knows one way from premultiplied grey
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey of up to 16 bits: TIFF holds 12 as 0 to 4095, and either end may be white."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    bits = tags.get(_BITS, (16,))[0]
    wide = np.asarray(image).astype(np.uint32)
    largest = 2**bits - 1
    grey = ((wide * 255 + largest // 2) // largest).astype(np.uint8)
    if tags.get(_PHOTOMETRIC, 1) == _WHITE_IS_ZERO:
        grey = 255 - grey
    if "transparency" in image.info:
        grey[wide == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _scale_transparency(image: Image.Image, stored: object) -> None:
    """PNG's transparent colour has the depth of the file, the pixels have 8 bits by now."""
    colour = image.info["transparency"]
    if ";16" in str(stored):
        raise UnreadablePixelsError("16-bit RGB with a transparent colour, which 8 bits cannot express; store an alpha channel")
    if isinstance(colour, int) and image.mode == "L":
        image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}.get(str(stored), 1)


def _refuse_tiff(image: Image.Image) -> None:
    """Raise UnreadablePixelsError for pixels that Pillow misreads."""
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    tags = image.tag_v2
    bits, formats = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))
    if _SIGNED in formats:
        raise UnreadablePixelsError(f"signed {bits[0]}-bit pixels {_NO_RANGE}")
    if _FLOAT in formats:
        raise UnreadablePixelsError(f"floating-point pixels {_NO_RANGE}")
    raw = tags.get(_COMPRESSION, 1) == 1
    if tags.get(_PLANAR, 1) == 2 and len(bits) > 1 and ((raw and max(bits) > 8) or image.mode in ("LA", "La", "PA")):
        raise UnreadablePixelsError(f"{len(bits)} planes of {max(bits)} bits, which Pillow cannot read; store them interleaved")
    if raw and tags.get(_PHOTOMETRIC) == _YCBCR and tuple(tags.get(_SUBSAMPLING, (2, 2))) != (1, 1):
        raise UnreadablePixelsError("uncompressed YCbCr with fewer colour samples, which Pillow cannot read; store RGB")


def _refuse_deep_colour(image: ImageFile.ImageFile) -> None:
    """Raise UnreadablePixelsError for JPEG 2000 with colours of more than 8 bits, whose white Pillow turns to black."""
    assert image.fp is not None
    at = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(at)
    size = data.find(b"\xff\x4f\xff\x51")  # where the codestream and its first segment (SIZ, ISO 15444-1 A.5.1) begin
    count = int.from_bytes(data[size + 40 : size + 42], "big")
    bits = max((1 + (depth & 0x7F) for depth in data[size + 42 : size + 42 + 3 * count : 3]), default=8)
    if size >= 0 and bits > 8:
        raise UnreadablePixelsError(f"JPEG 2000 of {bits}-bit colours, which Pillow cannot read; store 8 bits a channel")


def why_unidentified(data: bytes | memoryview, formats: Iterable[str]) -> str:
    """The reason why Pillow cannot open bytes that begin like one of the formats; "" for other bytes."""
    start = bytes(data[:16])
    for name in formats:
        factory, accept = Image.OPEN[name]
        accepted = accept(start) if accept else False
        if isinstance(accepted, str):
            return f"{name}: {accepted}"
        if not accepted:
            continue
        try:
            factory(io.BytesIO(data), "")
        except Exception as error:  # each plugin has errors of its own
            return f"{name}: {error or type(error).__name__}{_tiff_facts(data) if name == 'TIFF' else ''}"
    return ""


def _tiff_facts(data: bytes | memoryview) -> str:
    """Depth and kind of the samples, if the first directory can be read."""
    try:
        file = io.BytesIO(data)
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        bits, kind = tags[_BITS], {_SIGNED: "signed ", _FLOAT: "floating-point "}.get(tags.get(_SAMPLE_FORMAT, (1,))[0], "")
        return f" ({len(bits)} x {bits[0]} bits, {kind}photometric {tags[_PHOTOMETRIC]}); store 8 bits a channel, RGB or grey"
    except Exception:  # damaged: the plugin's own error is the reason
        return ""
