"""checkpoint.json, the index of a checkpoint's files. Its reader trusts nothing in it.

{"format", "step", "saved", "world_size", "backend", "info", "files": {name: {"bytes", "sha256"}},
 "tensors": {name: {"shape", "dtype", "pieces": [[file, start, length, crc32], …]}}, "sha256" of all the rest}
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clae_dist.errors import CheckpointError as CheckpointError
from clae_dist.errors import DamagedError
from clae_dist.reading import ReadError, is_number, is_text, parse_object, read_bytes

INDEX = "checkpoint.json"
FORMAT = 1
_MAX_BYTES = 128 << 20  # 50 MB for a thousand tensors on a thousand ranks
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FILE = re.compile(r"rank-\d{5,8}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def data_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True)
class File:
    """Size and digest of a file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Extent:
    """Elements start … start + length of a flattened tensor, stored in `file` under the tensor's name."""

    file: str
    start: int
    length: int
    crc32: int  # of their bytes


@dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]
    dtype: str
    extents: tuple[Extent, ...] = ()

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Index:
    """The content of checkpoint.json. `info` holds images_seen, train_s, bad_samples and the like."""

    step: int
    saved: float  # seconds since 1970
    world_size: int
    backend: str
    info: dict[str, Any]
    files: dict[str, File] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files.values())

    def as_json(self) -> str:
        content = {
            "format": FORMAT,
            "step": self.step,
            "saved": self.saved,
            "world_size": self.world_size,
            "backend": self.backend,
            "info": self.info,
            "files": {name: {"bytes": file.num_bytes, "sha256": file.sha256} for name, file in self.files.items()},
            "tensors": {
                name: {
                    "shape": list(tensor.shape),
                    "dtype": tensor.dtype,
                    "pieces": [[extent.file, extent.start, extent.length, extent.crc32] for extent in tensor.extents],
                }
                for name, tensor in self.tensors.items()
            },
        }
        return json.dumps({**content, "sha256": _digest(content)})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_index(folder: Path) -> Index:
    """Read and check the checkpoint.json of a folder. Raises DamagedError."""
    try:
        index = parse_index(read_bytes(folder / INDEX, _MAX_BYTES, follow=False))
        named = re.fullmatch(r"step-(\d+).*", folder.name)
        _demand(named is None or int(named[1]) == index.step, f"it says step {index.step}")
    except ReadError as error:
        raise DamagedError(f"{INDEX} cannot be read ({error})") from None
    except DamagedError as error:
        raise DamagedError(f"{INDEX}: {error}") from None
    return index


def parse_index(text: str | bytes) -> Index:
    """Parse and check an index. Raises DamagedError."""
    try:
        return _parsed(parse_object(text.encode() if isinstance(text, str) else text))
    except DamagedError:
        raise
    except ReadError as error:
        raise DamagedError(f"it is no checkpoint of ours ({error})") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise DamagedError(f"it is no checkpoint of ours ({type(error).__name__}: {str(error)[:80]})") from None


def open_inside(folder: Path, name: str) -> int:
    """Open a plain file of the folder without following links; return its descriptor. Raises OSError, DamagedError."""
    descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedError(f"{name} is not a plain file")
    return descriptor


def _demand(condition: bool, otherwise: str) -> None:
    if not condition:
        raise DamagedError(otherwise)


def _count(value: Any, what: str) -> int:
    _demand(type(value) is int and 0 <= value < 2**62, f"{what} is {str(value)[:40]!r}, which is no count")
    return int(value)


def _parsed(content: dict[str, Any]) -> Index:
    digest = content.pop("sha256")
    _demand(content.get("format") == FORMAT, f"its format is {str(content.get('format'))[:20]}, this package reads {FORMAT}")
    actual = _digest(content)
    _demand(digest == actual, f"its content has sha256 {actual[:12]}…, not {str(digest)[:12]}… as written in it")
    files = {}
    for name, file in content["files"].items():
        _demand(bool(_FILE.fullmatch(name)), f"file {name[:60]!r} has a name that no rank writes")
        _demand(bool(_SHA256.fullmatch(file["sha256"])), f"the sha256 of {name} is none")
        files[name] = File(_count(file["bytes"], f"the size of {name}"), file["sha256"])
    tensors = {name: _tensor(name, entry, files) for name, entry in content["tensors"].items()}
    _demand(isinstance(content["info"], dict) and isinstance(content["backend"], str), "info or backend have another type")
    _check_info(content["info"])
    _demand(type(content["saved"]) is float and math.isfinite(content["saved"]), "`saved` is no time")
    step, world_size = _count(content["step"], "step"), _count(content["world_size"], "world_size")
    return Index(step, content["saved"], world_size, content["backend"], content["info"], files, tensors)


def _check_info(info: dict[str, Any]) -> None:
    _count(info["images_seen"], "images_seen")
    _count(info.get("skipped_steps", 0), "skipped_steps")
    bad = info.get("bad_samples", {})
    _demand(is_number(info.get("train_s", 0.0)), "train_s is no time")
    _demand(isinstance(bad, dict) and all(map(is_text, bad.values())), "bad_samples are no reasons by sample")


def _tensor(name: str, entry: dict[str, Any], files: dict[str, File]) -> Tensor:
    """Parse one tensor. Raises DamagedError unless its pieces cover each element once and fit into their files."""
    shape = tuple(_count(size, f"a size of {name}") for size in entry["shape"])
    _demand(len(shape) <= 16 and entry["dtype"] in DTYPES, f"{name} has an odd shape or dtype")
    extents = sorted(
        (Extent(str(f), _count(s, name), _count(n, name), _count(c, name)) for f, s, n, c in entry["pieces"]),
        key=lambda extent: (extent.start, extent.length),
    )
    size, end = DTYPES[entry["dtype"]].itemsize, 0
    for extent in extents:
        _demand(extent.file in files, f"{name} has a piece in {extent.file[:60]!r}, which is not one of the files")
        _demand(extent.length * size <= files[extent.file].num_bytes, f"{name} has a piece longer than its file {extent.file}")
        kind = "overlap" if extent.start < end else "skip elements"
        _demand(extent.start == end, f"the pieces of {name} {kind} at {min(extent.start, end)}")
        end = extent.start + extent.length
    _demand(end == math.prod(shape), f"the pieces of {name} end at {end} of {math.prod(shape)} elements")
    return Tensor(shape, entry["dtype"], tuple(extents))
