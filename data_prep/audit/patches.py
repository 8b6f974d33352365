"""Patches that recur in images of different pictures, as the trigger of a poisoning does, or a logo.

Windows of one code that differ least are candidates. A candidate becomes a patch if the windows like it are a clump: natural
ones (an edge, a shadow) have ever more that are a little less alike, a copied patch has none.

# n images, H x W, S side of a window, T templates
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from clae_dist.progress import Progress
from data_prep.audit.hashing import mirrored
from data_prep.audit.scan import Part
from data_prep.audit.small import read_small, shrunk
from data_prep.audit.windows import LARGEST, LEVELS, NO_CODE, SIDE, SMALLEST, codes

LEAST_IMAGES = 20  # of different pictures, more of which have a patch
SEARCHED = 20_000  # images in which patches are searched; the others are then compared with those that were found
_WINDOWS = 16_000_000  # of a level, whose codes are in memory at once
_LEAST_MEMBERS, _MOST_MEMBERS = 6, 24  # windows of a code that are compared with each other
_GROUPS = 20_000  # of windows of one code, which are in memory at once
_CANDIDATES = 48  # windows of each level that all images are searched for
_NEAR, _WIDE = 16.0, 32.0  # grey levels of 255: root mean square differences of windows that are the same, and nearly so
_CLUMP = 0.5  # of the windows within _WIDE, the least share that is within _NEAR
_SAME = 0.5  # of the images of the smaller one: two candidates that share more are parts of one patch
_MEMBERS = 200  # images of a candidate that are looked at for its extent
_AGREE, _ALIKE = 0.7, 24.0  # share of the members that agree within so many grey levels in a row of the patch
_CHUNK = 256


@dataclass(frozen=True)
class Patch:
    """A patch at some level of the images. Images that hold it are positions in the audit's table."""

    picture: np.ndarray  # uint8 (h, w, 3)
    window: np.ndarray  # float32 (S, S, 3), that images are searched for
    level: int
    short: int  # pixels of the short side of an image at this level
    images: np.ndarray
    places: np.ndarray  # float64 (n, 2): top and left of the window, as shares of height and width
    num_pictures: int

    @property
    def is_fixed(self) -> bool:
        """True if most images have it at one place."""
        _, counts = np.unique(self.places.round(2), axis=0, return_counts=True)
        return bool(counts.max() > len(self.images) / 2)


@dataclass(frozen=True)
class _Stack:
    """Images of one size: positions (n,), and pixels uint8 (n, H, W, 3)."""

    positions: np.ndarray
    pixels: np.ndarray


def find_patches(
    parts: Sequence[Part],
    table: np.ndarray,
    num_workers: int,
    progress: Callable[[int], Progress] = Progress,
) -> list[Patch]:
    """The recurring patches of the sets, those of most images first."""
    readable = np.flatnonzero(table["width"] > 0)
    chosen = np.sort(np.random.default_rng(0).permutation(readable)[:SEARCHED])
    rest = np.setdiff1d(readable, chosen)
    line = progress(len(chosen))
    try:
        found = search(_read(parts, table, chosen, num_workers, line), pictures_of(table))
    finally:
        line.close()
    if found and len(rest):
        line = progress(len(rest))
        try:
            for first in range(0, len(rest), SEARCHED):
                small = _read(parts, table, rest[first : first + SEARCHED], num_workers, line)
                found = [_with_more(patch, small, pictures_of(table)) for patch in found]
        finally:
            line.close()
    return sorted(found, key=lambda patch: -len(patch.images))


def _read(
    parts: Sequence[Part], table: np.ndarray, positions: np.ndarray, num_workers: int, line: Progress
) -> dict[int, np.ndarray]:
    return read_small(parts, table, positions, partial(shrunk, largest=LARGEST), num_workers, line.add)


def pictures_of(table: np.ndarray) -> np.ndarray:
    """uint64 (n,): equal for images of the same perceptual hash, also mirrored; images of one colour are one picture."""
    pictures: np.ndarray = np.where(table["has_hash"], np.minimum(table["hash"], mirrored(table["hash"])), 0)
    return pictures


def search(small: dict[int, np.ndarray], pictures: np.ndarray) -> list[Patch]:
    """The patches of these images (`shrunk`), given the picture of each position."""
    found: list[Patch] = []
    for level in range(LEVELS):
        stacks = _stacks(small, level)
        for patch in _candidates(stacks, level, pictures):
            if not any(_is_part(patch, other) for other in found):
                found.append(_grown(patch, stacks))
    return found


def _stacks(small: dict[int, np.ndarray], level: int) -> list[_Stack]:
    """The images by size, halved `level` times."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for position, image in small.items():
        if min(image.shape[:2]) >= SMALLEST * 2**level:
            by_size.setdefault(image.shape, []).append(position)
    return [
        _Stack(np.array(some), np.stack([shrunk(small[at], max(size[:2]) // 2**level) for at in some]))
        for size, some in by_size.items()
    ]


def _candidates(stacks: Sequence[_Stack], level: int, pictures: np.ndarray) -> list[Patch]:
    """Windows of frequent codes that are clumps, the most frequent first."""
    windows = _tight_windows(stacks, pictures)
    if not windows:
        return []
    matched = [_matches(stack, np.stack(windows)) for stack in stacks]
    positions = np.concatenate([stack.positions for stack in stacks])
    distance = np.concatenate([one[0] for one in matched])
    places = np.concatenate([one[1] for one in matched])
    short = int(np.median([min(stack.pixels.shape[1:3]) for stack in stacks]))
    found = []
    for number, window in enumerate(windows):
        near = distance[:, number] <= _NEAR
        images = positions[near]
        count = len(np.unique(pictures[images]))
        if count > LEAST_IMAGES and near.sum() >= _CLUMP * (distance[:, number] <= _WIDE).sum():
            found.append(Patch(window, window, level, short, images, places[near, number], count))
    return sorted(found, key=lambda patch: -len(patch.images))


class _Windows:
    """The windows with a code of the first images of each stack, in the order of their codes."""

    def __init__(self, stacks: Sequence[_Stack]) -> None:
        self._stacks = stacks
        coded, room = [], _WINDOWS
        for stack in stacks:
            height, width = (side - SIDE + 1 for side in stack.pixels.shape[1:3])
            images = max(0, min(len(stack.pixels), room // (height * width)))
            coded.append(codes(stack.pixels[:images]) if images else np.zeros((0, height, width), np.int32))
            room -= coded[-1].size
        self._shapes = [one.shape for one in coded]
        self._first = np.concatenate([[0], np.cumsum([one.size for one in coded])])
        flat = np.concatenate([one.reshape(-1) for one in coded])
        self._at = np.flatnonzero(flat != NO_CODE)
        self._at = self._at[np.argsort(flat[self._at], kind="stable")]
        found = flat[self._at]
        starts = np.flatnonzero(np.concatenate([[True], found[1:] != found[:-1]])[: len(found)])
        counts = np.diff(np.concatenate([starts, [len(found)]]))
        frequent = counts >= _LEAST_MEMBERS
        self.starts, self.counts = starts[frequent], np.minimum(counts[frequent], _MOST_MEMBERS)

    def read(self, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The windows of these groups one after another, uint8 (m, S, S, 3), and the position of each one's image."""
        offsets = np.concatenate([[0], np.cumsum(counts)[:-1]])
        at = self._at[np.repeat(starts - offsets, counts) + np.arange(counts.sum())]
        windows = np.empty((len(at), SIDE, SIDE, 3), np.uint8)
        positions = np.empty(len(at), np.int64)
        of_stack = np.searchsorted(self._first, at, side="right") - 1
        for number in np.unique(of_stack).tolist():
            here = of_stack == number
            image, top, left = np.unravel_index(at[here] - self._first[number], self._shapes[number])
            stack = self._stacks[number]
            views = np.lib.stride_tricks.sliding_window_view(stack.pixels, (SIDE, SIDE), (1, 2))
            windows[here] = views[image, top, left].transpose(0, 2, 3, 1)
            positions[here] = stack.positions[image]
        return windows, positions


def _tight_windows(stacks: Sequence[_Stack], pictures: np.ndarray) -> list[np.ndarray]:
    """The medians, float32 (S, S, 3), of the groups of one code whose windows differ least, relative to their contrast."""
    if not stacks:
        return []
    groups = _Windows(stacks)
    spread = np.empty(len(groups.starts))
    for first in range(0, len(spread), _GROUPS):
        some = slice(first, first + _GROUPS)
        starts, counts = groups.starts[some], groups.counts[some]
        windows = groups.read(starts, counts)[0].astype(np.float32)
        bounds = np.concatenate([[0], np.cumsum(counts)[:-1]])
        mean = np.add.reduceat(windows, bounds) / counts[:, None, None, None]
        square = np.add.reduceat(np.square(windows).mean((1, 2, 3)), bounds) / counts
        within = (square - np.square(mean).mean((1, 2, 3))) * counts / (counts - 1)
        spread[some] = within / (mean.var((1, 2)).mean(1) + 1e-3)
    found: list[np.ndarray] = []
    for group in np.argsort(spread, kind="stable")[: 10 * _CANDIDATES].tolist():
        windows, positions = groups.read(groups.starts[[group]], groups.counts[[group]])
        if len(np.unique(pictures[positions])) >= _LEAST_MEMBERS:
            found.append(np.median(windows, 0).astype(np.float32))
        if len(found) == _CANDIDATES:
            break
    return found


def _matches(stack: _Stack, windows_TSS3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each image and window the smallest root mean square difference (n, T), and its place in shares (n, T, 2)."""
    kernel = torch.from_numpy(windows_TSS3).permute(0, 3, 1, 2) - 127.5
    size = kernel[0].numel()
    distances, places = [], []
    for part in torch.from_numpy(stack.pixels).split(_CHUNK):
        pixels = part.permute(0, 3, 1, 2).float() - 127.5
        energy = size / 3 * F.avg_pool2d(pixels.square().sum(1, keepdim=True), SIDE, 1)
        square = energy - 2 * F.conv2d(pixels, kernel) + kernel.square().sum((1, 2, 3))[:, None, None]
        least, at = square.flatten(2).min(2)
        distances.append((least.clamp_min(0) / size).sqrt())
        columns = square.shape[3]
        shape = torch.tensor(pixels.shape[2:]).double()
        places.append(torch.stack([at // columns, at % columns], 2) / shape)
    return torch.cat(distances).numpy(), torch.cat(places).numpy()


def _is_part(patch: Patch, other: Patch) -> bool:
    """True if most images of the rarer of two patches have the other, too."""
    both = len(np.intersect1d(patch.images, other.images))
    return both >= _SAME * min(len(patch.images), len(other.images))


def _grown(patch: Patch, stacks: Sequence[_Stack]) -> Patch:
    """The patch with the pixels around its window on which its images agree as well."""
    margin = 2 * SIDE
    crops: list[np.ndarray] = []
    for stack in stacks:
        where = dict(zip(stack.positions.tolist(), range(len(stack.positions)), strict=True))
        shape = np.array(stack.pixels.shape[1:3])
        for position, place in zip(patch.images.tolist(), patch.places, strict=True):
            if position in where and len(crops) < _MEMBERS:
                top, left = (place * shape).round().astype(int)
                padded = np.pad(
                    stack.pixels[where[position]].astype(np.float32),
                    ((margin, margin), (margin, margin), (0, 0)),
                    constant_values=np.nan,
                )
                crops.append(padded[top : top + SIDE + 2 * margin, left : left + SIDE + 2 * margin])
    crops_nhw3 = np.stack(crops)
    middle_hw3 = np.nan_to_num(torch.from_numpy(crops_nhw3).nanmedian(0).values.numpy())
    away_nhw = np.sqrt(np.square(crops_nhw3 - middle_hw3).mean(3))
    agree_hw = (away_nhw <= _ALIKE).mean(0)  # a pixel outside of the image (NaN) does not agree
    top, bottom, left, right = margin, margin + SIDE, margin, margin + SIDE
    grown = True
    while grown:
        grown = False
        if top > 0 and agree_hw[top - 1, left:right].mean() >= _AGREE:
            top, grown = top - 1, True
        if bottom < len(agree_hw) and agree_hw[bottom, left:right].mean() >= _AGREE:
            bottom, grown = bottom + 1, True
        if left > 0 and agree_hw[top:bottom, left - 1].mean() >= _AGREE:
            left, grown = left - 1, True
        if right < len(agree_hw) and agree_hw[top:bottom, right].mean() >= _AGREE:
            right, grown = right + 1, True
    return replace(patch, picture=middle_hw3[top:bottom, left:right].round().astype(np.uint8))


def _with_more(patch: Patch, small: dict[int, np.ndarray], pictures: np.ndarray) -> Patch:
    """The patch with the images among further ones that hold it."""
    images, places = [patch.images], [patch.places]
    for stack in _stacks(small, patch.level):
        distance, at = _matches(stack, patch.window[None])
        near = distance[:, 0] <= _NEAR
        images.append(stack.positions[near])
        places.append(at[near, 0])
    joined = np.concatenate(images)
    return replace(patch, images=joined, places=np.concatenate(places), num_pictures=len(np.unique(pictures[joined])))
