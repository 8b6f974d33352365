"""Decodes every image of the sets once and keeps one row of numbers for each: 48 bytes an image, whatever its size."""

from __future__ import annotations

import dataclasses
import io
import mmap
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clae_dist.data.manifest import Manifest, Shard, check_shard
from clae_dist.errors import DataError
from data_prep.audit.hashing import digest, perceptual_hash
from data_prep.pool import run_tasks

ROW = np.dtype(
    [
        ("part", np.uint16),  # position in the list of parts
        ("shard", np.uint32),  # position in its split
        ("row", np.uint32),  # in the shard's index
        ("label", np.int32),  # -1: none
        ("file", np.uint64),  # digest of the encoded bytes
        ("pixels", np.uint64),  # digest of the decoded image
        ("hash", np.uint64),
        ("has_hash", np.bool_),  # False for an image of one colour, and for one that cannot be decoded
        ("width", np.uint32),  # upright; 0: cannot be decoded
        ("height", np.uint32),
        ("mode", np.uint8),  # position in MODES
    ]
)
MODES = ("RGB", "grey", "palette", "CMYK", "with transparency", "16 bits", "black and white", "other")
_CHUNK = 512  # images a task


@dataclass(frozen=True)
class Part:
    """One split of one set."""

    set_name: str
    split: str
    manifest: Manifest

    @property
    def name(self) -> str:
        return f"{self.set_name}'s {self.split} split"

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.manifest.splits[self.split]


@dataclass(frozen=True)
class ScanTask:
    """Rows `start` … `stop` - 1 of one shard. `manifest` holds that shard only."""

    manifest: Manifest
    part: int
    split: str
    shard: int
    start: int
    stop: int
    first: int  # position of the first row in the table


@dataclass(frozen=True)
class ScanResult:
    first: int
    rows: np.ndarray  # ROW
    unreadable: tuple[tuple[int, str], ...]  # position in the table, reason


def scan(parts: Sequence[Part], num_workers: int, progress: Callable[[int], None]) -> tuple[np.ndarray, dict[int, str]]:
    """The table of all images (ROW), in the order of parts, shards and rows, and what cannot be decoded by position.

    Raises DataError for a shard or index that is missing or not as long as the manifest says.
    """
    tasks = _tasks(parts)
    table = np.zeros(sum(shard.samples for part in parts for shard in part.shards), ROW)
    unreadable: dict[int, str] = {}
    with closing(run_tasks(scan_rows, tasks, num_workers, progress)) as results:
        for result in results:
            table[result.first : result.first + len(result.rows)] = result.rows
            unreadable.update(result.unreadable)
    return table, unreadable


def _tasks(parts: Sequence[Part]) -> list[ScanTask]:
    tasks, first = [], 0
    for number, part in enumerate(parts):
        for position, shard in enumerate(part.shards):
            check_shard(part.manifest.folder, shard, "size")  # before hours of work
            alone = dataclasses.replace(part.manifest, splits={part.split: (shard,)})
            for start in range(0, shard.samples, _CHUNK):
                stop = min(start + _CHUNK, shard.samples)
                tasks.append(ScanTask(alone, number, part.split, position, start, stop, first))
                first += stop - start
    return tasks


def scan_rows(task: ScanTask, report: Callable[[int], None]) -> ScanResult:
    """The rows of one task; `report` hears of every 64 images. Raises DataError as `scan` does."""
    (shard,) = task.manifest.splits[task.split]
    index = task.manifest.index(shard)[task.start : task.stop]
    rows = np.zeros(len(index), ROW)
    rows["part"], rows["shard"], rows["label"] = task.part, task.shard, index[:, 2]
    rows["row"] = np.arange(task.start, task.stop)
    unreadable = []
    with open_shard(task.manifest.folder, shard) as mapped:
        for i, (offset, size, _) in enumerate(index.tolist()):
            problem = _look(rows[i], mapped[max(0, offset) : max(0, offset) + size])
            if problem:
                unreadable.append((task.first + i, problem))
            if i % 64 == 63:
                report(64)
    report(len(index) % 64)
    return ScanResult(task.first, rows, tuple(unreadable))


def open_shard(folder: Path, shard: Shard) -> mmap.mmap:
    """The shard's bytes, mapped. Raises DataError when it is not as the manifest says."""
    check_shard(folder, shard, "size")
    if not shard.bytes:
        raise DataError(f"{folder / shard.name} is empty; prepare the set again.")
    with (folder / shard.name).open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _look(row: np.void, data: bytes) -> str:
    """Fills the row of one image; returns why it cannot be decoded, or ""."""
    from clae_dist.data.decode import DecodeError, decode_rgb

    row["file"] = digest(data)
    try:
        pixels = decode_rgb(data).permute(1, 2, 0).contiguous().numpy()
    except DecodeError as error:
        return str(error)
    row["height"], row["width"] = pixels.shape[:2]
    row["mode"] = MODES.index(stored_mode(data))
    row["pixels"] = digest(b"%dx%d" % pixels.shape[:2] + digest(pixels.data).to_bytes(8, "little"))
    value = perceptual_hash(pixels)
    if value is not None:
        row["hash"], row["has_hash"] = value, True
    return ""


def stored_mode(data: bytes) -> str:
    """One of MODES: how the file holds its pixels, before decoding makes them RGB."""
    with warnings.catch_warnings(action="ignore"):
        image = Image.open(io.BytesIO(data))
    layouts = [str(part) for tile in image.tile for part in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    if ";16" in image.mode or image.mode == "I" or any(";16" in layout for layout in layouts):
        return "16 bits"
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return "with transparency"
    return {"RGB": "RGB", "L": "grey", "P": "palette", "CMYK": "CMYK", "1": "black and white"}.get(image.mode, "other")
