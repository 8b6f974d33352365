"""CIFAR-10 and CIFAR-100 in their binary archives: rows of labels and raw pixels, which become PNGs of the same pixels."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clae_dist.errors import DataError
from data_prep.sources.entry import Entry, Layout, Report, changed, stamp
from data_prep.sources.tar import first_member, plain_tar, tar_members

_SIDE = 32
_PIXEL_BYTES = 3 * _SIDE * _SIDE
_PNG_BYTES = _PIXEL_BYTES + 100  # at most about, for planning


@dataclass(frozen=True)
class _Kind:
    """One of the two sets. A row is `labels` bytes, the last of which counts, then the red, green and blue planes."""

    name: str
    folder: str
    pickles: str  # the folder in the archive for Python
    labels: int
    names: str  # the file with the classes' names
    splits: dict[str, str]  # split by file


_KINDS = (
    _Kind(
        name="cifar10",
        folder="cifar-10-batches-bin",
        pickles="cifar-10-batches-py",
        labels=1,
        names="batches.meta.txt",
        splits={**{f"data_batch_{number}.bin": "train" for number in range(1, 6)}, "test_batch.bin": "test"},
    ),
    _Kind(
        name="cifar100",
        folder="cifar-100-binary",
        pickles="cifar-100-python",
        labels=2,  # coarse, fine
        names="fine_label_names.txt",
        splits={"train.bin": "train", "test.bin": "test"},
    ),
)


def is_cifar(path: Path) -> bool:
    """True for one of the binary archives. Raises DataError for the archives of Python pickles."""
    top = first_member(path).removeprefix("./").split("/")[0]
    for kind in _KINDS:
        if top == kind.pickles:
            wanted = kind.folder.replace("batches-bin", "binary")
            raise DataError(
                f"{path} holds Python pickles, which can run any code when they are read; get {wanted}.tar.gz instead."
            )
    return any(top == kind.folder for kind in _KINDS)


class CifarSource:
    """One binary archive. Fine labels of CIFAR-100; its coarse ones are skipped."""

    pixels = "PNG of raw pixels"

    def __init__(self, path: Path) -> None:
        self.paths: tuple[Path, ...] = (path,)
        top = first_member(path).removeprefix("./").split("/")[0]
        self._kind = next(kind for kind in _KINDS if kind.folder == top)
        self.name = self._kind.name

    def fingerprint(self) -> str:
        return stamp(self.paths)

    def listing(self, scratch: Path, report: Report, /) -> Layout:
        """Decompresses into `scratch`, which the entries then refer to. Raises DataError for damaged archives."""
        kind, path = self._kind, self.paths[0]
        plain = plain_tar(path, scratch / "cifar.tar", report)
        files = {name.rpartition("/")[2]: entry for name, entry in tar_members(path, plain, report) if entry}
        missing = sorted({*kind.splits, kind.names} - set(files))
        if missing:
            raise DataError(f"{path} has no {missing[0]}; get the archive again.")
        with plain.open("rb") as stream:
            stream.seek(files[kind.names].offset)
            classes = tuple(stream.read(files[kind.names].size).decode().split())
            images: dict[str, dict[str, list[tuple[str, Entry]]]] = {}
            for name, split in kind.splits.items():
                stream.seek(files[name].offset)
                rows = _rows(path, name, stream.read(files[name].size), kind)
                groups = images.setdefault(split, {})
                for number, label in enumerate(rows[:, kind.labels - 1].tolist()):
                    if label >= len(classes):
                        raise DataError(
                            f"{path} has the label {label} in {name} and {len(classes)} classes; get the archive again."
                        )
                    key = f"{classes[label]}/{name.removesuffix('.bin')}_{number:05d}.png"
                    offset = files[name].offset + number * rows.shape[1] + kind.labels
                    entry = Entry(f"{split}/{key}", _PNG_BYTES, str(plain), offset, CifarFile)
                    groups.setdefault(classes[label], []).append((key, entry))
        return Layout(classes, images, given=True)


def _rows(path: Path, name: str, data: bytes, kind: _Kind) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 (images, bytes a row) of one file."""
    row = kind.labels + _PIXEL_BYTES
    if not data or len(data) % row:
        raise DataError(f"{path} has {len(data)} bytes in {name}, which are no whole rows of {row}; get the archive again.")
    return np.frombuffer(data, np.uint8).reshape(-1, row)


class CifarFile:
    """Raw pixels at an offset, as PNG bytes."""

    def __init__(self, file: str, /) -> None:
        self._descriptor = os.open(file, os.O_RDONLY)

    def read(self, entry: Entry, /) -> bytes:
        raw = os.pread(self._descriptor, _PIXEL_BYTES, entry.offset)
        if len(raw) != _PIXEL_BYTES:
            raise changed(entry, f"{_PIXEL_BYTES} bytes")
        pixels = np.frombuffer(raw, np.uint8).reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)
        stream = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
        return stream.getvalue()

    def close(self) -> None:
        os.close(self._descriptor)
