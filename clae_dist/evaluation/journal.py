"""Results of an evaluation's units of work (a batch of images), kept as they come: a kill costs at most the unit in hand.

Every process appends to a file of its own, so that ranks need no lock and a file that was cut off is never appended to. A
record is MAGIC, the unit's number, the length and the CRC of its payload, and the payload: tensors in safetensors' format.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from uuid import uuid4

import torch
from safetensors.torch import load, save

from clae_dist.storage import writing

_MAGIC = b"CLJ1"
_HEADER = struct.Struct("<4sqqI")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Where:
    path: Path
    start: int
    length: int


class Journal:
    """The finished units in `folder`, of this and of earlier processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[bytes] | None = None
        self._found = self._scan()

    @property
    def finished(self) -> frozenset[int]:
        """The units that were there when the journal was opened."""
        return frozenset(self._found)

    def read(self, unit: int) -> Tensors:
        """The tensors of a finished unit."""
        where = self._found[unit]
        with where.path.open("rb") as file:
            file.seek(where.start)
            return load(file.read(where.length))

    def __iter__(self) -> Iterator[tuple[int, Tensors]]:
        """The finished units in ascending order, one in memory at a time."""
        for unit in sorted(self._found):
            yield unit, self.read(unit)

    def add(self, unit: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Append a unit and force it to storage. Raises StorageError if that is full or broken."""
        payload = save({name: value.contiguous().cpu() for name, value in tensors.items()})
        with writing(self.folder):
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = (self.folder / f"{uuid4().hex}.part").open("xb")
            self._file.write(_HEADER.pack(_MAGIC, unit, len(payload), zlib.crc32(payload)) + payload)
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Delete all records."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _scan(self) -> dict[int, _Where]:
        found: dict[int, _Where] = {}
        for path in sorted(self.folder.glob("*.part")):
            for unit, where in _records(path):
                found.setdefault(unit, where)
        return found


def _records(path: Path) -> Iterator[tuple[int, _Where]]:
    """The whole records of a file; one that was cut off or damaged ends it."""
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            magic, unit, length, crc = _HEADER.unpack(header)
            start = file.tell()
            payload = file.read(length) if magic == _MAGIC and 0 <= length <= os.fstat(file.fileno()).st_size else b""
            if not payload or len(payload) != length or zlib.crc32(payload) != crc:
                return
            yield unit, _Where(path, start, length)
