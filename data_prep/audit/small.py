"""Images of an audit, small, in memory: what the search for patches looks at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from clae_dist.data.manifest import Manifest
from data_prep.audit.scan import Part, open_shard
from data_prep.pool import run_tasks

_CHUNK = 512  # images a task


@dataclass(frozen=True)
class SmallTask:
    """Some rows of one shard; `manifest` holds that shard only. `shape` makes an image small."""

    manifest: Manifest
    split: str
    rows: tuple[int, ...]
    positions: tuple[int, ...]  # of these rows in the table
    shape: Callable[[np.ndarray], np.ndarray]


def read_small(
    parts: Sequence[Part],
    table: np.ndarray,
    positions: np.ndarray,
    shape: Callable[[np.ndarray], np.ndarray],
    num_workers: int,
    progress: Callable[[int], None],
) -> dict[int, np.ndarray]:
    """The images at these positions of the table, uint8 (H, W, 3), as `shape` makes them; undecodable ones are skipped."""
    tasks = list(_tasks(parts, table, positions, shape))
    found: dict[int, np.ndarray] = {}
    with closing(run_tasks(read_rows, tasks, num_workers, progress)) as results:
        for result in results:
            found.update(result)
    return {at: found[at] for at in positions.tolist() if at in found}


def _tasks(
    parts: Sequence[Part], table: np.ndarray, positions: np.ndarray, shape: Callable[[np.ndarray], np.ndarray]
) -> list[SmallTask]:
    tasks = []
    rows = table[positions]
    for part, shard in np.unique(rows[["part", "shard"]]).tolist():
        chosen = positions[(rows["part"] == part) & (rows["shard"] == shard)]
        one = parts[part]
        alone = dataclasses.replace(one.manifest, splits={one.split: (one.shards[shard],)})
        for first in range(0, len(chosen), _CHUNK):
            some = chosen[first : first + _CHUNK]
            tasks.append(SmallTask(alone, one.split, tuple(table["row"][some].tolist()), tuple(some.tolist()), shape))
    return tasks


def read_rows(task: SmallTask, report: Callable[[int], None]) -> dict[int, np.ndarray]:
    """The images of one task by position; `report` hears of them."""
    from clae_dist.data.decode import DecodeError, decode_rgb

    (shard,) = task.manifest.splits[task.split]
    index = task.manifest.index(shard)
    found = {}
    with open_shard(task.manifest.folder, shard) as mapped:
        for row, position in zip(task.rows, task.positions, strict=True):
            offset, size = index[row, :2].tolist()
            try:
                pixels = decode_rgb(mapped[offset : offset + size]).permute(1, 2, 0).contiguous().numpy()
            except DecodeError:
                continue  # listed by the scan
            found[position] = task.shape(pixels)
    report(len(task.rows))
    return found


def shrunk(pixels_HW3: np.ndarray, largest: int) -> np.ndarray:
    """The image with a long side of at most `largest` pixels, each the mean of those that it covers."""
    from PIL import Image

    height, width = pixels_HW3.shape[:2]
    factor = largest / max(height, width)
    if factor >= 1:
        return pixels_HW3
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(Image.fromarray(pixels_HW3).resize(size, Image.Resampling.BOX))


def view(pixels_HW3: np.ndarray, side: int) -> np.ndarray:
    """The centre of the image as evaluation sees it, `side` x `side`."""
    import torch

    from clae_dist.data.views import centre_view

    return centre_view(torch.from_numpy(pixels_HW3).permute(2, 0, 1), side).permute(1, 2, 0).contiguous().numpy()
