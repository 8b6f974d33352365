"""Every depth and kind of pixels becomes the right 8-bit RGB, or is refused with the true reason.

The files are written bit by bit here; what they hold is compared with a second decoder (tifffile, OpenCV) as well.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from clae_dist.data.decode import decode_rgb, inspect

HEIGHT, WIDTH = 5, 7
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
UNSIGNED, SIGNED, FLOAT = 1, 2, 3


def samples(channels: int, bits: int) -> np.ndarray:
    """uint64 (H, W, channels), the darkest and the lightest among them."""
    values = np.random.default_rng([channels, bits]).integers(0, 2**bits, (HEIGHT, WIDTH, channels), np.uint64)
    values[0, 0], values[0, 1], values[0, 2] = 0, 2**bits - 1, 2**bits - 2
    return values


def packed(row: np.ndarray, bits: int) -> bytes:
    text = "".join(format(int(value), f"0{bits}b") for value in row)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


def tiff(values: np.ndarray, bits: int, photometric: int, **options: Any) -> bytes:
    """`options`: kind, order ("<", ">"), compressed, planes, extra, palette, subsampling."""
    order, kind = options.get("order", "<"), options.get("kind", UNSIGNED)
    height, width, channels = values.shape

    def strip(part: np.ndarray) -> bytes:
        if bits in (8, 16, 32, 64):
            data = part.astype(f"{order}{' uif'[kind]}{bits // 8}").tobytes()
        else:
            data = b"".join(packed(row.reshape(-1), bits) for row in part)
        return zlib.compress(data) if options.get("compressed") else data

    planes = options.get("planes", False)
    strips = [strip(values[..., n : n + 1]) for n in range(channels)] if planes else [strip(values)]
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits] * channels),
        259: ("H", [8 if options.get("compressed") else 1]),
        262: ("H", [photometric]),
        273: ("I", list(np.cumsum([8] + [len(one) + len(one) % 2 for one in strips[:-1]]))),
        277: ("H", [channels]),
        278: ("I", [height]),
        279: ("I", [len(one) for one in strips]),
        284: ("H", [2 if planes else 1]),
        339: ("H", [kind] * channels),
    }
    for tag, name in ((338, "extra"), (320, "palette"), (530, "subsampling")):
        if name in options:
            tags[tag] = ("H", list(options[name]))
    body = b"".join(one + bytes(len(one) % 2) for one in strips)
    directory, more = struct.pack(order + "H", len(tags)), b""
    after = 8 + len(body) + 2 + 12 * len(tags) + 4
    for tag, (code, numbers) in sorted(tags.items()):
        data = struct.pack(f"{order}{len(numbers)}{code}", *map(int, numbers))
        place = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(order + "I", after + len(more))
        directory += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[code], len(numbers)) + place
        more += data + bytes(len(data) % 2) if len(data) > 4 else b""
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(body))
    return start + body + directory + bytes(4) + more


def png(values: np.ndarray, bits: int, kind: int, palette: bytes = b"", transparent: bytes = b"") -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b"".join(b"\0" + (row.astype(">u2").tobytes() if bits == 16 else packed(row.reshape(-1), bits)) for row in values)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, kind, 0, 0, 0)
    parts = [chunk(name, body) for name, body in ((b"PLTE", palette), (b"tRNS", transparent)) if body]
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + b"".join(parts) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pnm(values: np.ndarray, largest: int, plain: bool = False) -> bytes:
    kind = {1: 5, 3: 6}[values.shape[2]] - (3 if plain else 0)
    start = b"P%d %d %d %d\n" % (kind, WIDTH, HEIGHT, largest)
    return start + (
        b" ".join(b"%d" % value for value in values.reshape(-1))
        if plain
        else values.astype(">u2" if largest > 255 else "u1").tobytes()
    )


def eight(values: np.ndarray, largest: int) -> np.ndarray:
    return values.astype(np.float64) * 255 / largest


def grey(values: np.ndarray, largest: int, white_is_zero: bool = False) -> np.ndarray:
    pixels = eight(values, largest)
    return np.repeat(255 - pixels if white_is_zero else pixels, 3, axis=2)


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return pixels * alpha + 255 * (1 - alpha)


def check(data: bytes, expected: np.ndarray, tolerance: float = 1.0) -> None:
    """16 bits may be rounded or cut to 8, and alpha is applied afterwards: a tolerance of 2 where both happen."""
    assert inspect(data).problem == ""
    found = decode_rgb(data).permute(1, 2, 0).numpy().astype(np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance


def refused(data: bytes, reason: str) -> None:
    assert reason in inspect(data).problem


TIFF_FORMS = [{"order": order, "compressed": compressed} for order in "<>" for compressed in (False, True)]


@pytest.mark.parametrize("form", TIFF_FORMS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 10, 12, 14, 16, 32])
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO])
def test_grey_tiffs(photometric: int, bits: int, form: dict[str, Any]) -> None:
    """12 bits were nearly black, and 16 with white at zero inverted."""
    values = samples(1, bits)
    data = tiff(values, bits, photometric, **form)
    if bits in (8, 16, 32):
        assert (tifffile.imread(io.BytesIO(data)).reshape(values.shape) == values).all()
    read = bits in (1, 2, 4, 8) or (bits == 16 and (photometric or form["order"] == "<"))
    read = read or (bits == 12 and photometric == BLACK_IS_ZERO and form["order"] == "<")
    if read:
        check(data, grey(values, 2**bits - 1, photometric == WHITE_IS_ZERO))
    elif bits == 32 and photometric and form["order"] == "<":
        refused(data, "32-bit pixels have no agreed range")
    else:
        refused(data, f"cannot be read as TIFF: unknown pixel mode (1 x {bits} bits, photometric {photometric})")


@pytest.mark.parametrize("form", TIFF_FORMS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planes", [False, True])
def test_colour_tiffs(planes: bool, bits: int, form: dict[str, Any]) -> None:
    """16-bit planes were read as 8-bit ones."""
    largest = 2**bits - 1
    rgb, cmyk = samples(3, bits), samples(4, bits)
    ink = 1 - cmyk.astype(np.float64) / largest
    for values, photometric, expected in ((rgb, RGB, eight(rgb, largest)), (cmyk, CMYK, 255 * ink[..., :3] * ink[..., 3:])):
        data = tiff(values, bits, photometric, planes=planes, **form)
        second = tifffile.imread(io.BytesIO(data))
        assert ((np.moveaxis(second, 0, 2) if planes else second) == values).all()
        if planes and bits == 16 and not form["compressed"]:
            refused(data, f"{values.shape[2]} planes of 16 bits, which Pillow cannot read; store them interleaved")
        else:
            check(data, expected, 2.0)


@pytest.mark.parametrize("form", TIFF_FORMS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extra", [0, 1, 2])  # not specified, premultiplied alpha, alpha
def test_tiffs_with_a_further_channel(extra: int, bits: int, form: dict[str, Any]) -> None:
    largest = 2**bits - 1
    for channels, photometric in ((2, BLACK_IS_ZERO), (4, RGB)):
        values = samples(channels, bits)
        alpha = values[..., -1:].astype(np.float64) / largest
        if extra == 1:
            values[..., :-1] = values[..., :-1] * alpha
        pixels = eight(values[..., :-1], largest)
        expected = {0: pixels, 1: pixels + 255 * (1 - alpha), 2: on_white(pixels, alpha)}[extra]
        data = tiff(values, bits, photometric, extra=(extra,), **form)
        if channels == 2 and bits == 16:
            refused(data, "cannot be read as TIFF: unknown pixel mode (2 x 16 bits")
        else:
            # Premultiplied colours of nearly transparent pixels are divided and multiplied again.
            check(data, np.broadcast_to(expected, (HEIGHT, WIDTH, 3)), 3.0)
    if bits == 8 and extra:
        refused(tiff(samples(2, 8), 8, BLACK_IS_ZERO, extra=(extra,), planes=True, **form), "2 planes of 8 bits")


@pytest.mark.parametrize("form", TIFF_FORMS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_tiffs(bits: int, form: dict[str, Any]) -> None:
    values, colours = samples(1, bits), np.random.default_rng(bits).integers(0, 256, (3, 2**bits))
    data = tiff(values, bits, PALETTE, palette=(colours * 257).reshape(-1), **form)
    check(data, colours.T[values[..., 0].astype(int)])


@pytest.mark.parametrize("form", TIFF_FORMS)
@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_samples_without_an_agreed_range(bits: int, form: dict[str, Any]) -> None:
    """Signed 8 bits were read as unsigned ones, and signed 16 were refused as 32."""
    if bits < 64:
        values = samples(1, bits).astype(np.int64) - 2 ** (bits - 1)
        refused(tiff(values, bits, BLACK_IS_ZERO, kind=SIGNED, **form), f"signed {bits}-bit pixels have no agreed range")
    if bits > 8:
        reason = (
            "floating-point pixels have no agreed range" if bits == 32 else f"(1 x {bits} bits, floating-point photometric 1)"
        )
        refused(tiff(samples(1, 8) / 255, bits, BLACK_IS_ZERO, kind=FLOAT, **form), reason)
        refused(tiff(samples(3, 8) / 255, bits, RGB, kind=FLOAT, **form), f"(3 x {bits} bits, floating-point photometric 2)")


def test_other_colour_spaces() -> None:
    rgb = samples(3, 8).astype(np.uint8)
    ycc = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    check(tiff(ycc, 8, YCBCR, subsampling=(1, 1)), rgb, 3.0)  # rounded on the way there and back
    check(tiff(ycc, 8, YCBCR, subsampling=(1, 1), compressed=True), rgb, 3.0)
    refused(tiff(ycc, 8, YCBCR, subsampling=(2, 2)), "uncompressed YCbCr with fewer colour samples")
    refused(tiff(ycc, 8, YCBCR), "uncompressed YCbCr with fewer colour samples")  # (2, 2) is TIFF's default
    muted = rgb // 4 + 96  # the two whites, OpenCV's D65 and TIFF's D50, tell saturated colours apart
    lab = cv2.cvtColor(muted, cv2.COLOR_RGB2LAB)
    stored = np.concatenate([lab[..., :1], lab[..., 1:] - 128], axis=2)  # TIFF's a and b are signed bytes
    found = decode_rgb(tiff(stored.astype(np.uint8), 8, LAB)).permute(1, 2, 0).numpy().astype(float)
    assert np.abs(found - muted).max() <= 8


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_and_palette_pngs(bits: int) -> None:
    """Of 2, 4 and 16 bits the wrong pixels, or none, were transparent."""
    values, largest = samples(1, bits), 2**bits - 1
    pixels = grey(values, largest)
    second = cv2.imdecode(np.frombuffer(png(values, bits, 0), np.uint8), cv2.IMREAD_UNCHANGED)
    assert (second == eight(values[..., 0], 255 if bits == 16 else largest / 255 * 255).round()).all() or bits == 16
    check(png(values, bits, 0), pixels)
    for transparent in {0, largest, int(values[1, 1, 0])}:
        expected = np.where(values == transparent, 255, pixels)
        check(png(values, bits, 0, transparent=struct.pack(">H", transparent)), expected)
    if bits < 16:
        rng = np.random.default_rng(bits)
        colours, alpha = rng.integers(0, 256, (2**bits, 3), np.uint8), rng.integers(0, 256, (2**bits, 1), np.uint8)
        rows = values[..., 0].astype(int)
        check(png(values, bits, 3, colours.tobytes()), colours[rows])
        data = png(values, bits, 3, colours.tobytes(), alpha.tobytes())
        check(data, on_white(colours[rows].astype(float), alpha[rows] / 255))


@pytest.mark.parametrize("bits", [8, 16])
def test_pngs_with_several_channels(bits: int) -> None:
    largest = 2**bits - 1
    for channels, kind in ((3, 2), (2, 4), (4, 6)):
        values = samples(channels, bits)
        pixels = eight(values, largest)
        expected = pixels if channels == 3 else on_white(pixels[..., :-1], pixels[..., -1:] / 255)
        check(png(values, bits, kind), np.broadcast_to(expected, (HEIGHT, WIDTH, 3)), 2.0)
    data = png(values := samples(3, bits), bits, 2, transparent=values[1, 1].astype(">u2").tobytes())
    if bits == 16:
        refused(data, "16-bit RGB with a transparent colour, which 8 bits cannot express")
    else:
        check(data, np.where((values == values[1, 1]).all(axis=2, keepdims=True), 255, values))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("largest", [1, 100, 255, 256, 1023, 4095, 16383, 65535])
def test_netpbm(largest: int, plain: bool) -> None:
    """PGMs of more than 8 bits were refused as 32."""
    rng = np.random.default_rng(largest)
    for channels in (1, 3):
        values = rng.integers(0, largest + 1, (HEIGHT, WIDTH, channels))
        check(pnm(values, largest, plain), np.broadcast_to(eight(values, largest), (HEIGHT, WIDTH, 3)))
    refused(b"Pf %d %d -1.0\n" % (WIDTH, HEIGHT) + bytes(4 * WIDTH * HEIGHT), "floating-point pixels have no agreed range")


@pytest.mark.parametrize("white", [60_000, 65_407, 65_408, 65_535])
def test_jpeg_2000(white: int) -> None:
    """Of 16-bit colours, white became black."""
    values = np.linspace(0, white, 40 * 48).reshape(40, 48).astype(np.uint16)
    best = (cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000)
    check(cv2.imencode(".jp2", values, best)[1].tobytes(), grey(values[..., None], 65_535), 2.0)
    colours = np.stack([values, values // 2, values // 3], axis=2)
    refused(cv2.imencode(".jp2", colours, best)[1].tobytes(), "JPEG 2000 of 16-bit colours, which Pillow cannot read")
    low = (colours >> 8).astype(np.uint8)
    check(cv2.imencode(".jp2", low, best)[1].tobytes(), low[..., ::-1].astype(float), 2.0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("format", ["BMP", "GIF", "PNG", "WEBP"])
def test_opencv_decodes_the_same(format: str, mode: str) -> None:
    image = Image.fromarray(samples(3, 8).astype(np.uint8)).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(samples(1, 8)[..., 0].astype(np.uint8)))
    stream = io.BytesIO()
    image.save(stream, format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    second = cv2.imdecode(np.frombuffer(stream.getvalue(), np.uint8), cv2.IMREAD_UNCHANGED)
    second = second.reshape(HEIGHT, WIDTH, -1).astype(float)
    pixels = second[..., 2::-1] if second.shape[2] > 1 else second  # it has blue first
    expected = on_white(pixels, second[..., 3:] / 255) if second.shape[2] == 4 else pixels
    check(stream.getvalue(), np.broadcast_to(expected, (HEIGHT, WIDTH, 3)))


def test_what_begins_as_an_image_is_refused_as_such() -> None:
    refused(b"\x89PNG\r\n\x1a\n" + bytes(40), "cannot be read as PNG")
    refused(b"II*\0\xff\xff\xff\xff" + bytes(40), "cannot be read as TIFF")
    refused(b"GIF89a", "cannot be read as GIF")
    refused(b"RIFF\0\0\0\0WAVEfmt ", "not an image of a format that is read")
