"""audit(): prepared sets in, everything found in them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clae_dist.data.manifest import Manifest, load_manifest
from clae_dist.errors import DataError
from clae_dist.progress import Progress
from data_prep.audit.hashing import MAX_NEAR_BITS
from data_prep.audit.overlap import KINDS, Groups, NearSamples, SamplePair, group_by, join_near
from data_prep.audit.profile import profile
from data_prep.audit.scan import Part, scan

_GROUPS_TRIED, _LOOKED_AT = 2000, 64  # groups, and members of each, among which a pair to show is looked for


@dataclass(frozen=True)
class Audit:
    """n images in P parts, all sets after another. Arrays by kind of sameness: file, pixels, near."""

    parts: tuple[Part, ...]
    table: np.ndarray  # ROW (n,)
    near_bits: int
    limit_pictures: int  # of each kind
    near_is_complete: bool  # False: too many pairs are near, and the counts of near copies are lower bounds
    unreadable: dict[int, str]  # position in the table: reason
    profiles: tuple[dict[str, Any], ...]  # of each part
    overlaps: dict[str, np.ndarray]  # int64 (P, P): images of part s that have a copy in part t (its own: another one)
    copies: dict[str, np.ndarray]  # bool (n, P): which images these are
    conflicts: dict[str, np.ndarray]  # bool (n,): images whose copy in the same set has another label
    pairs: tuple[SamplePair, ...]  # a sample to look at
    conflict_pairs: tuple[SamplePair, ...]

    def leaks(self) -> Iterator[tuple[int, int, dict[str, int]]]:
        """(s, t, images by kind) for every two parts that share images.

        s is the held-out one where only one is, else the one that was named later.
        """
        for s in range(len(self.parts)):
            for t in range(s + 1, len(self.parts)):
                of, other = (s, t) if self.parts[t].split == "train" != self.parts[s].split else (t, s)
                found = {kind: int(self.overlaps[kind][of, other]) for kind in KINDS}
                if any(found.values()):
                    yield of, other, found

    def leaked(self, kind: str) -> int:
        """Images of one part that have a copy in another, counted once for every two parts."""
        return sum(found[kind] for _, _, found in self.leaks())


def audit(
    folders: Sequence[Path],
    *,
    near_bits: int,
    limit_pictures: int,
    num_workers: int,
    progress: Callable[[int], Progress] = Progress,
) -> Audit:
    """Reads every image of the prepared sets. Raises DataError for a folder that is none, or not as its manifest says."""
    if not 0 <= near_bits <= MAX_NEAR_BITS:
        raise DataError(f"--near-bits is {near_bits}; use 0 to {MAX_NEAR_BITS}: unlike images differ in about 32 of 64 bits.")
    parts = tuple(_parts(folders))
    line = progress(sum(part.manifest.num_samples(part.split) for part in parts))
    try:
        table, unreadable = scan(parts, num_workers, line.add)
    finally:
        line.close()
    set_of_part = _set_of_part(parts)
    readable = table["width"] > 0
    by_kind = {
        "file": group_by(table["file"], readable, table, set_of_part, alone=False),
        "pixels": group_by(table["pixels"], readable, table, set_of_part, alone=False),
        "near": group_by(table["hash"], table["has_hash"], table, set_of_part, alone=True),
    }
    near = join_near(by_kind["near"], np.unique(table["hash"][table["has_hash"]]), near_bits, limit_pictures)
    sets = np.asarray(set_of_part)[table["part"]]
    copies = {kind: groups.flags(table["part"]) for kind, groups in by_kind.items()}
    conflicts = {kind: groups.conflicts(sets) for kind, groups in by_kind.items()}
    # An image of one colour has no hash, but its exact copies are near ones all the same.
    copies["near"] |= copies["pixels"]
    conflicts["near"] |= conflicts["pixels"]
    overlaps = {
        kind: np.stack([found[table["part"] == number].sum(axis=0, dtype=np.int64) for number in range(len(parts))])
        for kind, found in copies.items()
    }
    choose = _Chooser(table, by_kind, near, limit_pictures)
    return Audit(
        parts,
        table,
        near_bits,
        limit_pictures,
        near.complete,
        unreadable,
        tuple(profile(table[table["part"] == number], part.manifest.classes) for number, part in enumerate(parts)),
        overlaps,
        copies,
        conflicts,
        tuple(choose.pairs(len(parts))),
        tuple(choose.conflicts(sets)),
    )


def _parts(folders: Sequence[Path]) -> Iterator[Part]:
    manifests = [load_manifest(folder) for folder in folders]
    seen: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in seen:
            raise DataError(f"{folder} is named twice; name every set once: copies within a set are found, too.")
        seen[folder.resolve()] = folder
    for manifest in manifests:
        if not manifest.splits:
            raise DataError(f"{manifest.folder} has no split and no image; prepare the set again.")
        yield from (Part(_set_name(manifest, manifests), split, manifest) for split in manifest.splits)


def _set_name(manifest: Manifest, manifests: Sequence[Manifest]) -> str:
    alone = [other.name for other in manifests].count(manifest.name) == 1
    return manifest.name if alone else f"{manifest.name} ({manifest.folder})"


def _set_of_part(parts: Sequence[Part]) -> list[int]:
    names = list(dict.fromkeys(part.set_name for part in parts))
    return [names.index(part.set_name) for part in parts]


class _Chooser:
    """Chooses pairs of images to look at: `limit` of a kind for every two parts."""

    def __init__(self, table: np.ndarray, by_kind: dict[str, Groups], near: NearSamples, limit: int) -> None:
        self._table, self._by_kind, self._near, self._limit = table, by_kind, near, limit

    def pairs(self, num_parts: int) -> Iterator[SamplePair]:
        for s in range(num_parts):
            for t in range(s, num_parts):
                for kind in KINDS[:2]:
                    yield from self._equal(kind, s, t)
                same_hash = list(self._equal("near", s, t))
                yield from [*same_hash, *self._close(s, t)][: self._limit]

    def conflicts(self, sets: np.ndarray) -> Iterator[SamplePair]:
        label, pixels = self._table["label"], self._table["pixels"]

        def fits(i: int, j: int) -> bool:
            return bool(sets[i] == sets[j] and -1 != label[i] != label[j] != -1)

        for kind in ("pixels", "near"):
            groups = self._by_kind[kind]
            for group in np.flatnonzero((groups.lowest < groups.highest).any(axis=1))[: self._limit].tolist():
                members = groups.members(group)
                new = fits if kind == "pixels" else lambda i, j: fits(i, j) and bool(pixels[i] != pixels[j])
                yield from _first(members, members, new, kind)
        near = self._by_kind["near"]
        for bits, a, b, turned in self._near.conflicts.rows():
            yield from _first(near.members(a), near.members(b), fits, "near", bits, bool(turned))

    def _equal(self, kind: str, s: int, t: int) -> Iterator[SamplePair]:
        """Pairs of one group of that kind which are not of the kind before it."""
        groups, shown = self._by_kind[kind], 0
        before = self._table[KINDS[KINDS.index(kind) - 1]] if kind != "file" else None
        both = (groups.count[:, s] > 0) & (groups.count[:, t] > (s == t))
        for group in np.flatnonzero(both)[:_GROUPS_TRIED].tolist():
            if shown == self._limit:
                return
            first, second = self._within(groups, group, s), self._within(groups, group, t)
            for pair in _first(first, second, lambda i, j: before is None or bool(before[i] != before[j]), kind):
                yield pair
                shown += 1

    def _close(self, s: int, t: int) -> Iterator[SamplePair]:
        groups = self._by_kind["near"]
        for bits, a, b, turned in self._near.by_parts[s, t].rows():
            a, b = (a, b) if groups.count[a, s] and groups.count[b, t] else (b, a)
            here, there = self._within(groups, a, s), self._within(groups, b, t)
            yield from _first(here, there, lambda i, j: True, "near", bits, bool(turned))

    def _within(self, groups: Groups, group: int, part: int) -> np.ndarray:
        members = groups.members(group)
        return members[self._table["part"][members] == part]


def _first(
    first: np.ndarray, second: np.ndarray, fits: Callable[[int, int], bool], kind: str, bits: int = 0, mirrored: bool = False
) -> Iterator[SamplePair]:
    """The first pair of two different images that fits, if there is one."""
    for i in first[:_LOOKED_AT].tolist():
        for j in second[:_LOOKED_AT].tolist():
            if i != j and fits(i, j):
                yield SamplePair(kind, i, j, bits, mirrored)
                return
