"""Tar and zip archives of an image folder, one or several that together make one.

None is spread over the disk as small files. Images are read at their places in the archive; only a compressed tar, which
has no places, is decompressed into one plain tar in a scratch folder first.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clae_dist.data.image_names import is_hidden, is_image_name
from clae_dist.errors import DataError
from data_prep.sources.entry import ORIGINAL_BYTES, Entry, Listing, Report, plain_name, stamp
from data_prep.sources.tar import plain_tar, tar_members
from data_prep.sources.zip import is_zip, zip_members
from data_prep.split_folders import tops_of
from data_prep.split_names import files_by_split, splits_of


class ArchiveSource:
    """One archive, or several that together make one folder."""

    pixels = ORIGINAL_BYTES

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self.paths = paths
        self.name = plain_name(paths)

    def fingerprint(self) -> str:
        return stamp(self.paths)

    def listing(self, scratch: Path, report: Report, /) -> Listing:
        """Decompresses tars into `scratch`, which entries then refer to. Raises DataError for damaged or unsafe archives."""
        parts = [_members(path, scratch / f"{number}.tar", report) for number, path in enumerate(self.paths)]
        splits = _splits_by_name(self.paths, parts)
        if splits:
            parts = [_in_folder(_without_leading_folder(part), split) for part, split in zip(parts, splits, strict=True)]
        entries: dict[str, Entry] = {}
        for part in parts:
            both = next((entry.path for entry in part.entries if entry.path in entries), None)
            if both is not None:
                raise DataError(
                    f"{both} is in {' and in '.join(str(path) for path in self.paths)}; archives of one set share no file."
                )
            entries.update({entry.path: entry for entry in part.entries})
        folders = frozenset().union(*(part.folders for part in parts))
        ignored = tuple(name for part in parts for name in part.ignored)
        skipped = tuple(dict.fromkeys(name for part in parts for name in part.skipped))
        listing = Listing(tuple(entries[path] for path in sorted(entries)), folders, ignored, skipped)
        return _without_leading_folder(listing)


def _splits_by_name(paths: tuple[Path, ...], parts: list[Listing]) -> list[str]:
    """The split of each archive where their names alone tell (`train.zip`, `test.zip`); [] for one set without splits.

    Raises DataError for archives of which only some are called like a split.
    """
    if any(splits_of(tops_of(_without_leading_folder(part).entries) or {""}) for part in parts):
        return []  # the folders in them say it
    try:
        by_name = files_by_split(path.name for path in paths)
    except ValueError as error:
        raise DataError(f"{error}; which one is it? Rename the archive.") from None
    splits = [by_name[path.name] for path in paths]
    if len(paths) < 2 or not set(splits) - {"", "train"}:
        return []
    if "" in splits or len(set(splits)) < len(splits):
        raise DataError(
            f"{' and '.join(path.name for path in paths)} do not tell their splits by their names; name one archive train and "
            "one test, or put train/ and test/ into them."
        )
    return splits


def _in_folder(listing: Listing, folder: str) -> Listing:
    entries = tuple(dataclasses.replace(entry, path=f"{folder}/{entry.path}") for entry in listing.entries)
    folders = frozenset({folder, *(f"{folder}/{path}" for path in listing.folders)})
    return dataclasses.replace(listing, entries=entries, folders=folders)


def _members(path: Path, unpacked: Path, report: Report) -> Listing:
    """The members of one archive."""
    entries: dict[str, Entry] = {}
    folders: set[str] = set()
    ignored: list[str] = []
    skipped: dict[str, None] = {}
    found = zip_members(path) if is_zip(path) else tar_members(path, plain_tar(path, unpacked, report), report)
    for name, entry in found:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not parts:
            continue
        inside = parts if entry is None else parts[:-1]
        hidden = next((depth for depth, part in enumerate(inside) if is_hidden(part)), None)
        if hidden is not None:
            skipped["/".join(inside[: hidden + 1])] = None
            continue
        folders.update("/".join(inside[: depth + 1]) for depth in range(len(inside)))
        if entry is None:
            continue
        name = "/".join(parts)
        if is_image_name(parts[-1]):
            entries[name] = dataclasses.replace(entry, path=name)
        else:
            ignored.append(name)
    return Listing(tuple(entries.values()), frozenset(folders), tuple(ignored), tuple(skipped))


def _without_leading_folder(listing: Listing) -> Listing:
    """Archives are often made of one folder that holds everything; it is not a class."""
    tops = {path.split("/")[0] for path in listing.folders}
    if len(tops) != 1 or splits_of(tops):
        return listing
    prefix = tops.pop() + "/"
    if not listing.entries or any(entry.path.count("/") < 2 for entry in listing.entries):
        return listing
    entries = tuple(dataclasses.replace(entry, path=entry.path.removeprefix(prefix)) for entry in listing.entries)
    folders = frozenset(path.removeprefix(prefix) for path in listing.folders if path.startswith(prefix))
    return dataclasses.replace(listing, entries=entries, folders=folders)
