"""From a listing of files to the plan of the shards: classes, splits, keys, order. Pure: no reading, no writing."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from clae_dist.errors import DataError
from data_prep.settings import PrepareSettings
from data_prep.sources.entry import Entry, Layout, Listing
from data_prep.spelling import merge_spellings, one_spelling_each
from data_prep.split_folders import class_root, find_splits, refuse_splits_inside, tops_of
from data_prep.split_names import split_of

_Images = dict[str, dict[str, list[tuple[str, Entry]]]]
_UNLABELLED = "The images lie in no class folders: they get no labels (-1)."
_WAY_OUT = "The folder should hold one folder of images a class, or train/ and test/ (or val/) that do."


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One image to be written: where its bytes are, its key in the shard, its label (-1: none)."""

    entry: Entry
    key: str
    label: int


@dataclass(frozen=True)
class ShardPlan:
    name: str
    split: str
    samples: tuple[PlannedSample, ...]


@dataclass(frozen=True)
class SetPlan:
    """The shards to write, with notes for the user."""

    classes: tuple[str, ...]
    shards: tuple[ShardPlan, ...]
    splits_from: str  # "source", "drawn" or "none"
    notes: tuple[str, ...]

    @property
    def num_images(self) -> int:
        return sum(len(shard.samples) for shard in self.shards)


def make_plan(found: Listing | Layout, settings: PrepareSettings, where: str) -> SetPlan:
    """Classes, splits and shards of what `where` holds. Raises DataError for layouts that cannot be meant."""
    layout = _arrange(found, where) if isinstance(found, Listing) else one_spelling_each(found)
    for name in layout.classes:
        if not name.isprintable():
            raise DataError(f"{where} has the class {name!r}, whose name is not valid text; rename it.")
    labels = {"": -1, **{name: label for label, name in enumerate(layout.classes)}}
    samples = {
        split: [PlannedSample(entry, key, labels[name]) for name, key, entry in _with_keys(groups)]
        for split, groups in layout.images.items()
    }
    splits_from = "source" if layout.given else "drawn" if settings.test_share else "none"
    if splits_from == "drawn":
        samples = _draw_test_split(samples["train"], settings)
    shards = [shard for split in sorted(samples, reverse=True) for shard in _cut(split, samples[split], settings)]
    return SetPlan(layout.classes, tuple(shards), splits_from, layout.notes)


def _arrange(listing: Listing, where: str) -> Layout:
    """Derive classes and splits from the folders."""
    if not listing.entries:
        also = f" (but {len(listing.ignored)} other files, such as {listing.ignored[0]})" if listing.ignored else ""
        raise DataError(f"{where} holds no images{also}. {_WAY_OUT}")
    images, given, notes = _by_split(listing, where)
    if listing.ignored:
        notes.append(
            f"{len(listing.ignored)} files are no images by their names and were skipped, such as {listing.ignored[0]}."
        )
    if listing.skipped:
        notes.append(f"Hidden folders and a system's own, skipped: {len(listing.skipped)}, such as {listing.skipped[0]}.")
    labels = [path for path in listing.ignored if path.endswith(".cls")]
    if labels:
        notes.append(f"{where} looks like WebDataset shards ({labels[0]}): `python -m data_prep index` keeps their labels.")
    unread = [path for path in listing.ignored if path.rpartition("/")[2].startswith("metadata.")]
    if unread:
        notes.append(f"{unread[0]} is not read: classes are folders' names.")
    classes = sorted({name for groups in images.values() for name in groups if name})
    return Layout(tuple(classes), images, given, tuple(notes))


def _by_split(listing: Listing, where: str) -> tuple[_Images, bool, list[str]]:
    """Images by split and class, whether the splits are given, and what a user should know."""
    tops_with_images = tops_of(listing.entries)
    direct = [entry.path for entry in listing.entries if "/" not in entry.path]
    if direct and tops_with_images:
        raise DataError(
            f"{where} holds {len(direct)} images, such as {direct[0]}, beside folders of images, such as "
            f"{min(tops_with_images)}/; move them into a class folder or away."
        )
    if direct:
        images = {"train": {"": [(entry.path, entry) for entry in listing.entries]}}
        return images, False, [_UNLABELLED]
    root, splits = find_splits(listing, where)
    named = {path for path in listing.folders if "/" not in path and split_of(path)}
    if len({split_of(name) for name in named}) > 1 and "train" in map(split_of, named):
        root, splits = "", {name: split_of(name) for name in named}  # also the empty ones, which are then refused
    if splits:
        return _arrange_splits(listing, root, splits, tops_with_images, where)
    refuse_splits_inside(listing, where)
    merged, spellings = merge_spellings({"train": _by_class(listing, "", where)})
    _refuse_empty({name for name, images in merged["train"].items() if not images}, where)
    notes = spellings + [f"The folder {name}/ is taken for a class, as the folders beside it are." for name in sorted(named)]
    return merged, False, notes


def _arrange_splits(
    listing: Listing, root: str, splits: dict[str, str], tops_with_images: set[str], where: str
) -> tuple[_Images, bool, list[str]]:
    """Split folders below `root`. A single held-out folder is the split "test", whatever it is called."""
    others = sorted(tops_with_images - set(splits)) if not root else []
    if others:
        raise DataError(
            f"{where} has the split folders {_some(sorted(splits))} and also images in {', '.join(others)}; move those away."
        )
    for split in set(splits.values()):
        same = sorted(name for name in splits if splits[name] == split)
        if len(same) > 1:
            raise DataError(f"{where} has {' and '.join(same)}, which mean the same; keep one of them.")
    held_out = [name for name, split in splits.items() if split != "train"]
    names = {**splits, held_out[0]: "test"} if len(held_out) == 1 else splits
    notes = [f"The folder {root}{name}/ becomes the split {split}." for name, split in sorted(names.items()) if name != split]
    roots = {split: class_root(listing.entries, f"{root}{name}/") for name, split in names.items()}
    below = {split: _below(listing, folder) for split, folder in roots.items()}
    if not any("/" in path for found in below.values() for path, _ in found):
        images = {split: {"": found} for split, found in below.items()}
        notes.append(_UNLABELLED)
    else:
        images, spellings = merge_spellings({split: _by_class(listing, folder, where) for split, folder in roots.items()})
        notes += spellings
    every_class = {name for groups in images.values() for name in groups}
    full = {split: {name for name, group in groups.items() if group} for split, groups in images.items()}
    for split, present in full.items():
        if not present:
            raise DataError(f"{where} has no images for the split {split}. {_WAY_OUT}")
    _refuse_empty(every_class - set().union(*full.values()), where)
    for split, present in full.items():
        missing = sorted(every_class - present)
        if missing:
            notes.append(f"The split {split} has no images of {_some(missing)}.")
    if "train" not in images:
        notes.append("The source has no train split; training needs one, or data.train_split.")
    if set(images) == {"train"}:
        notes.append("The source has a train split only: what is drawn for the test split comes from it.")
    return images, set(images) != {"train"}, notes


def _below(listing: Listing, root: str) -> list[tuple[str, Entry]]:
    """The images in or below `root`, with their paths from there."""
    return [(entry.path[len(root) :], entry) for entry in listing.entries if entry.path.startswith(root)]


def _by_class(listing: Listing, root: str, where: str) -> dict[str, list[tuple[str, Entry]]]:
    """Images below `root` ("" or "folder/") by class folder; folders without images have an empty list."""
    groups: dict[str, list[tuple[str, Entry]]] = {
        path[len(root) :]: [] for path in listing.folders if path.startswith(root) and "/" not in path[len(root) :]
    }
    for below, entry in _below(listing, root):
        if "/" not in below:
            raise DataError(f"{where} has the image {entry.path} in no class folder; move it into one or away. {_WAY_OUT}")
        groups[below.split("/")[0]].append((below, entry))
    return groups


def _refuse_empty(empty: set[str], where: str) -> None:
    if empty:
        folders = "class folders" if len(empty) > 1 else "the class folder"
        raise DataError(
            f"{where} has {folders} {_some(sorted(empty))} without images; remove what is no class, or put its images there."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _with_keys(groups: dict[str, list[tuple[str, Entry]]]) -> Iterable[tuple[str, str, Entry]]:
    """(class, key, entry) for every image of a split; keys are unique and mean one thing to WebDataset's readers."""
    taken: set[str] = set()
    for name in sorted(groups):
        for path, entry in groups[name]:
            key = plain = _safe_key(path)
            number = 1
            while key in taken:  # a.jpg beside a.png, or a.b.jpg beside a_b.jpg
                number += 1
                key = f"{plain}-{number}"
            taken.add(key)
            yield name, key, entry


def _safe_key(path: str) -> str:
    """The path without its extension and without dots (the first one ends a key) or anything else that is not plain."""
    key = re.sub(r"[^\w/-]", "_", path.rpartition(".")[0])
    return re.sub(r"^(__+|/+)+", "", key) or "_"  # readers skip names such as __meta__/…


def _rank(salt: str, settings: PrepareSettings, key: str) -> bytes:
    """A number drawn by (seed, key): sorting by it is a permutation that no library's generator can change."""
    return hashlib.blake2b(f"{settings.seed}/{salt}/{key}".encode(errors="surrogateescape"), digest_size=16).digest()


def _draw_test_split(samples: list[PlannedSample], settings: PrepareSettings) -> dict[str, list[PlannedSample]]:
    """The same share of every class, at least one image of each class that has two, never all of them."""
    by_label: defaultdict[int, list[PlannedSample]] = defaultdict(list)
    for sample in samples:
        by_label[sample.label].append(sample)
    train, test = [], []
    for group in by_label.values():
        group.sort(key=lambda sample: _rank("draw", settings, sample.key))
        count = min(len(group) - 1, max(1, round(settings.test_share * len(group))))
        test += group[:count]
        train += group[count:]
    return {"train": train, "test": test} if test else {"train": train}


def _place(split: str, settings: PrepareSettings, sample: PlannedSample) -> tuple[bytes, int, bytes]:
    """Where a sample comes in a split's permutation; what is best read together stays together, in drawn order."""
    run, part = sample.entry.run
    drawn = _rank(split, settings, sample.key)
    return (_rank(split, settings, run), part, drawn) if run else (drawn, 0, b"")


def _cut(split: str, samples: list[PlannedSample], settings: PrepareSettings) -> list[ShardPlan]:
    """Shards of (almost) equal counts within both limits, in a seeded permutation of the samples."""
    samples = sorted(samples, key=lambda sample: _place(split, settings, sample))
    sizes = [2048 + -(-sample.entry.size // 512) * 512 for sample in samples]  # two headers and the label's block, rounded up
    num_shards = max(1, -(-len(samples) // settings.shard_samples), -(-sum(sizes) // settings.shard_bytes))
    while num_shards < len(samples):
        bounds = [len(samples) * shard // num_shards for shard in range(num_shards + 1)]
        if all(sum(sizes[a:b]) <= settings.shard_bytes for a, b in pairwise(bounds)):
            break
        num_shards += max(1, num_shards // 50)
    num_shards = max(1, min(num_shards, len(samples)))
    bounds = [len(samples) * shard // num_shards for shard in range(num_shards + 1)]
    return [ShardPlan(f"{split}-{i:06d}.tar", split, tuple(samples[bounds[i] : bounds[i + 1]])) for i in range(num_shards)]
