"""Damage, drawn: bytes to other bytes, the same for the same generator. For the fuzz tests."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

Rng = np.random.Generator
_BOUNDARIES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def _at(rng: Rng, data: bytes) -> int:
    """A position, half of them in the first 64 bytes, where headers are."""
    return int(rng.integers(0, min(len(data), 64) if rng.random() < 0.5 else len(data))) if data else 0


def cut_short(rng: Rng, data: bytes) -> bytes:
    return data[: _at(rng, data)]


def flip_bits(rng: Rng, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        out[_at(rng, data)] ^= 1 << int(rng.integers(8))
    return bytes(out)


def write_number(rng: Rng, data: bytes) -> bytes:
    """A length or size field made extreme: 1, 2 or 4 bytes, either order."""
    width = int(rng.choice([1, 2, 4]))
    number = int(rng.choice(_BOUNDARIES)) & (256**width - 1)
    at = _at(rng, data)
    return data[:at] + number.to_bytes(width, "little" if rng.random() < 0.5 else "big") + data[at + width :]


def drop(rng: Rng, data: bytes) -> bytes:
    at = _at(rng, data)
    return data[:at] + data[at + int(rng.integers(1, 200)) :]


def repeat(rng: Rng, data: bytes) -> bytes:
    at, length = _at(rng, data), int(rng.integers(1, 600))
    return data[: at + length] + data[at : at + length] * int(rng.integers(1, 4)) + data[at + length :]


def noise(rng: Rng, data: bytes) -> bytes:
    at, length = _at(rng, data), int(rng.integers(1, 100))
    return data[:at] + rng.bytes(length) + data[at + length :]


def mutate(rng: Rng, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One to three kinds of damage; with `others` also a splice: the beginning of this, the end of another."""
    ways: list[Callable[[Rng, bytes], bytes]] = [cut_short, flip_bits, write_number, drop, repeat, noise]
    if others and rng.random() < 0.15:
        other = others[int(rng.integers(len(others)))]
        data = data[: _at(rng, data)] + other[_at(rng, other) :]
    for _ in range(int(rng.integers(1, 4))):
        if not data:
            break
        data = ways[int(rng.integers(len(ways)))](rng, data)
    return data


def sample_images() -> list[bytes]:
    """Small images of every format and the modes whose decoding goes its own way."""
    rng = np.random.default_rng(7)
    picture = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((41, 30), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(rng.integers(0, 65536, (9, 13), np.uint16))
    made = []

    def add(image: Image.Image, format: str, **options: object) -> None:
        stream = io.BytesIO()
        image.save(stream, format, **options)
        made.append(stream.getvalue())

    add(picture, "JPEG")
    add(picture, "JPEG", progressive=True, exif=exif)
    add(picture.convert("L"), "JPEG", restart_marker_blocks=2)
    add(picture.convert("CMYK"), "JPEG")
    for mode in ("RGB", "RGBA", "LA", "P", "1"):
        add(picture.convert(mode), "PNG")
    add(wide, "PNG")
    add(picture, "WEBP", lossless=True)
    add(picture.convert("RGBA"), "WEBP", exif=exif)
    add(picture.convert("P"), "GIF", save_all=True, append_images=[picture.convert("P").rotate(90)])
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        add(picture, "TIFF", compression=compression)
    add(wide, "TIFF")
    add(picture, "BMP")
    add(picture.convert("P"), "BMP")
    add(picture, "PPM")
    return made


def sample_tar(rng: Rng, images: Sequence[bytes], outside: str) -> bytes:
    """An archive of an image folder, in one of tar's formats; one in two also holds a member that means harm."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=int(rng.integers(3))) as tar:
        harm = int(rng.integers(0, 12)) if rng.random() < 0.5 else -1
        for number in range(6):
            if number == harm:
                _add_harm(rng, tar, images[0], outside)
            data = images[int(rng.integers(len(images)))]
            deep = "x" * 150 + "/" if rng.random() < 0.1 and tar.format != tarfile.USTAR_FORMAT else ""
            _add(tar, f"{('cat', 'dog')[number % 2]}/{deep}{number}.jpg", data)
    return stream.getvalue()


def _add_harm(rng: Rng, tar: tarfile.TarFile, data: bytes, outside: str) -> None:
    names = ("../harm.jpg", f"{outside}/harm.jpg", "cat/../../../harm.jpg", "cat/./..//../harm.jpg", "..", "/", "cat/..")
    if rng.random() < 0.5:
        _add(tar, names[int(rng.integers(len(names)))], data)
        return
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE)
    member = tarfile.TarInfo("cat/harm" + (".jpg" if rng.random() < 0.5 else ""))
    member.type = kinds[int(rng.integers(len(kinds)))]
    member.linkname = ("..", outside, "../../harm.jpg", "dog")[int(rng.integers(4))]
    tar.addfile(member)
    _add(tar, "cat/harm/through.jpg", data)  # through the link, where one was made


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def compress(rng: Rng, data: bytes) -> bytes:
    """As .gz, .bz2 or .xz."""
    return (gzip.compress, bz2.compress, lzma.compress)[int(rng.integers(3))](data)


def damage_header(rng: Rng, data: bytes) -> bytes:
    """Damages fields of a tar's headers and makes their checksums right again, so that readers believe them."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 3))):
        headers = [at for at in range(0, len(out) - 511, 512) if out[at + 257 : at + 262] == b"ustar"]
        if not headers:
            break
        at = headers[int(rng.integers(len(headers)))]
        start, length = ((0, 100), (100, 8), (124, 12), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155))[
            int(rng.integers(8))
        ]
        values = (
            b"%0*o" % (length - 1, int(rng.integers(0, 1 << 40))),
            b"\x80" + rng.bytes(length - 1),  # base 256
            b"\xff" * length,  # base 256, negative
            rng.bytes(length),
            bytes(length),
            (b"../" * 60)[:length],
        )
        field = values[int(rng.integers(len(values)))]
        out[at + start : at + start + length] = field[:length].ljust(length, b"\0")
        out[at + 148 : at + 156] = b" " * 8
        out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)
