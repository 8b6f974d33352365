"""Groups of images that show the same picture, and the parts (splits of sets) that hold the copies.

n images, P parts, S sets, G groups: the images of a group have the same file, the same pixels or the same perceptual hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.audit.hashing import mirrored
from data_prep.audit.near import near_pairs

KINDS = ("file", "pixels", "near")  # each holds for the images of the one before it, too
MAX_PAIRS = 20_000_000  # of near hashes: a set of pictures that all look alike has n² / 2, and no use for a list of them


@dataclass
class Groups:
    """The images grouped by one kind of sameness. Images that are not looked at, or alone, are in no group."""

    of: np.ndarray  # int64 (n,): group of each image, -1: none
    count: np.ndarray  # int32 (G, P): images of the group in each part
    near: np.ndarray  # bool (G, P): another group that is near has images in the part
    lowest: np.ndarray  # int32 (G, S): labels of the group's images in each set; lowest above highest where there are none
    highest: np.ndarray
    conflict: np.ndarray  # bool (G, S): near another group with another label in the set
    _order: np.ndarray = field(init=False)
    _starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._order = np.argsort(self.of, kind="stable")
        self._starts = np.searchsorted(self.of[self._order], np.arange(len(self.count) + 1))

    def members(self, group: int) -> np.ndarray:
        """Positions of the group's images."""
        return self._order[self._starts[group] : self._starts[group + 1]]

    def has_copy(self, own: int, other: int) -> np.ndarray:
        """bool (G,): whether an image of the group that lies in part `own` has a copy in part `other`."""
        copy: np.ndarray = self.near[:, other] | (self.count[:, other] > (1 if own == other else 0))
        return copy & (self.count[:, own] > 0)

    def overlap(self) -> np.ndarray:
        """int64 (P, P): images of part s that have a copy in part t; on the diagonal those with a copy in their own part."""
        parts = range(self.count.shape[1])
        return np.array([[self.count[self.has_copy(s, t), s].sum() for t in parts] for s in parts], np.int64)

    def flags(self, parts_n: np.ndarray) -> np.ndarray:
        """bool (n, P): images that have a copy in part t. `parts_n` is each image's own part."""
        flags = np.zeros((len(self.of), self.count.shape[1]), bool)
        known = np.flatnonzero(self.of >= 0)
        own, group = parts_n[known], self.of[known]
        for other in range(flags.shape[1]):
            flags[known, other] = self.near[group, other] | (self.count[group, other] > (own == other))
        return flags

    def conflicts(self, sets_n: np.ndarray) -> np.ndarray:
        """bool (n,): images whose copy in the same set has another label."""
        found = np.zeros(len(self.of), bool)
        known = np.flatnonzero(self.of >= 0)
        group, own = self.of[known], sets_n[known]
        found[known] = (self.lowest[group, own] < self.highest[group, own]) | self.conflict[group, own]
        return found


def group_by(keys: np.ndarray, chosen: np.ndarray, table: np.ndarray, set_of_part: Sequence[int], alone: bool) -> Groups:
    """Groups of equal `keys` among the `chosen` (bool) images; `alone`: groups of one image, too."""
    positions = np.flatnonzero(chosen)
    _, group, size = np.unique(keys[positions], return_inverse=True, return_counts=True)
    if not alone:
        kept = size > 1
        renumbered = np.where(kept, np.cumsum(kept) - 1, -1)
        positions, group = positions[kept[group]], renumbered[group[kept[group]]]
        size = size[kept]
    num_groups, num_parts, num_sets = len(size), len(set_of_part), max(set_of_part) + 1
    of = np.full(len(keys), -1, np.int64)
    of[positions] = group
    parts = table["part"][positions].astype(np.int64)
    count = np.bincount(group * num_parts + parts, minlength=num_groups * num_parts).astype(np.int32)
    lowest = np.full((num_groups, num_sets), np.iinfo(np.int32).max, np.int32)
    highest = np.full((num_groups, num_sets), -1, np.int32)
    labels, sets = table["label"][positions], np.asarray(set_of_part)[parts]
    labelled = labels >= 0
    np.minimum.at(lowest, (group[labelled], sets[labelled]), labels[labelled])
    np.maximum.at(highest, (group[labelled], sets[labelled]), labels[labelled])
    shape = (num_groups, num_parts)
    return Groups(of, count.reshape(shape), np.zeros(shape, bool), lowest, highest, np.zeros((num_groups, num_sets), bool))


@dataclass(frozen=True)
class SamplePair:
    """Two images for the eye, by their position in the table. `bits`: the distance of their hashes; 0 for the same pixels."""

    kind: str  # file, pixels or near
    first: int
    second: int
    bits: int = 0
    mirrored: bool = False


class PairSample:
    """Of many near pairs the closest and the farthest, `limit` in all: the sure ones and those to judge the threshold by."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept = np.zeros((0, 4), np.int64)  # bits, group, group, mirrored

    def add(self, pairs: np.ndarray) -> None:
        by_bits = np.argsort(pairs[:, 0], kind="stable")
        few = 2 * self._limit  # at either end: a pair that is near both ways comes twice
        if len(pairs) > 2 * few:
            pairs = pairs[np.concatenate([by_bits[:few], by_bits[len(by_bits) - few :]])]
        rows = np.unique(np.concatenate([self._kept, pairs]), axis=0)
        closest = (self._limit + 1) // 2
        if len(rows) > self._limit:
            rows = np.concatenate([rows[:closest], rows[len(rows) - (self._limit - closest) :]])
        self._kept = rows

    def rows(self) -> list[list[int]]:
        return list(self._kept.tolist())


@dataclass
class NearSamples:
    """Pairs of groups to show: by two parts (s <= t), and those of a label conflict."""

    by_parts: dict[tuple[int, int], PairSample]
    conflicts: PairSample
    complete: bool = True  # False: there are more than MAX_PAIRS, and the rest was skipped


def join_near(groups: Groups, hashes: np.ndarray, max_bits: int, limit: int) -> NearSamples:
    """Marks in `groups` (by hash, one of `hashes` each) which groups are near another, also mirrored; returns a sample."""
    num_groups, num_parts = groups.count.shape
    samples = NearSamples({(s, t): PairSample(limit) for s in range(num_parts) for t in range(s, num_parts)}, PairSample(limit))
    num_pairs = 0
    for a, b, bits in near_pairs(np.concatenate([hashes, mirrored(hashes)]), max_bits):
        num_pairs += len(a)
        if num_pairs > MAX_PAIRS:
            samples.complete = False
            break
        a, b = np.minimum(a, b), np.maximum(a, b)
        turned = b >= num_groups
        b = np.where(turned, b - num_groups, b)
        useful = (a < num_groups) & (a != b)  # both mirrored says nothing new; symmetric images are no copy of themselves
        a, b, bits, turned = a[useful], b[useful], bits[useful], turned[useful]
        pairs = np.stack([bits, np.minimum(a, b), np.maximum(a, b), turned], axis=1).astype(np.int64)
        present_a, present_b = groups.count[a] > 0, groups.count[b] > 0
        for part in range(num_parts):
            groups.near[a[present_b[:, part]], part] = True
            groups.near[b[present_a[:, part]], part] = True
        for (s, t), sample in samples.by_parts.items():
            sample.add(pairs[(present_a[:, s] & present_b[:, t]) | (present_a[:, t] & present_b[:, s])])
        lowest = np.minimum(groups.lowest[a], groups.lowest[b])
        highest = np.maximum(groups.highest[a], groups.highest[b])
        both = (groups.highest[a] >= 0) & (groups.highest[b] >= 0)
        conflict = both & (lowest < highest)
        for number in range(conflict.shape[1]):
            groups.conflict[a[conflict[:, number]], number] = True
            groups.conflict[b[conflict[:, number]], number] = True
        samples.conflicts.add(pairs[conflict.any(axis=1)])
    return samples
