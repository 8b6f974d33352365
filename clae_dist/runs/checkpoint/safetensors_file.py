"""Streaming writer of the safetensors format: each byte is hashed and written once, without a copy."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from clae_dist.runs.checkpoint.index import DTYPE_NAMES, DTYPES, File

_CHUNK = 8 << 20  # bytes that are hashed and written at a time; both let other threads run meanwhile


@dataclass(frozen=True)
class Spec:
    """Name, shape and dtype of a tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> Spec:
        return Spec(name, tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor in the order of its elements; a view if it is contiguous."""
    row: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(row)


def _header(specs: Sequence[Spec], metadata: dict[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    assert len(entries) == len(specs) + bool(metadata), "two tensors of one name"
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path,
    specs: Sequence[Spec],
    tensors: Iterable[torch.Tensor],
    metadata: dict[str, str] | None = None,
    check: Callable[[], None] = lambda: None,
) -> tuple[File, list[int]]:
    """Write CPU tensors one by one, in the order of `specs`; the bytes are on the disk on return.

    Only a tensor that is not contiguous is copied, while it is written.

    Args:
        check: called every few megabytes; an exception from it ends the writing.

    Returns: size and sha256 of the file, crc32 of each tensor.
    Raises: OSError.
    """
    sha256, crcs, total = hashlib.sha256(), [], 0

    def put(file: IO[bytes], data: memoryview, crc: int = 0) -> int:
        nonlocal total
        for start in range(0, len(data), _CHUNK):
            check()
            chunk = data[start : start + _CHUNK]
            sha256.update(chunk)
            crc = zlib.crc32(chunk, crc)
            file.write(chunk)
        total += len(data)
        return crc

    with path.open("wb") as file:
        put(file, memoryview(_header(specs, metadata or {})))
        for spec, tensor in zip(specs, tensors, strict=True):
            assert Spec.of(spec.name, tensor) == spec, f"expected {spec}, got {Spec.of(spec.name, tensor)}"
            crcs.append(put(file, bytes_of(tensor)))
        file.flush()
        os.fsync(file.fileno())
    return File(total, sha256.hexdigest()), crcs


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """sha256 over the names, shapes, types and values of tensors on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(bytes_of(value.detach().cpu()))
    return digest.hexdigest()
