"""Tar and zip archives of an image folder, one or several that together make one.

None is spread over the disk as small files. Images are read at their places in the archive; only a compressed tar, which
has no places, is decompressed into one plain tar in a scratch folder first.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clae_dist.data.manifest import DataError
from data_prep.sources.entry import ORIGINAL_BYTES, Entry, Listing, Report, is_hidden, is_image_name, plain_name, stamp
from data_prep.sources.tar import plain_tar, tar_members
from data_prep.sources.zip import is_zip, zip_members


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
        entries: dict[str, Entry] = {}
        folders: set[str] = set()
        ignored: list[str] = []
        for number, path in enumerate(self.paths):
            found = _members(path, scratch / f"{number}.tar", report, folders, ignored)
            both = next((name for name in found if name in entries), None)
            if both is not None:
                raise DataError(
                    f"{both} is in {' and in '.join(str(path) for path in self.paths)}; archives of one set share no file."
                )
            entries.update(found)
        listing = Listing(tuple(entries[path] for path in sorted(entries)), frozenset(folders), tuple(ignored))
        return _without_leading_folder(listing)


def _members(path: Path, unpacked: Path, report: Report, folders: set[str], ignored: list[str]) -> dict[str, Entry]:
    """Images of one archive by path; adds to `folders` and `ignored`."""
    entries: dict[str, Entry] = {}
    found = zip_members(path) if is_zip(path) else tar_members(path, plain_tar(path, unpacked, report), report)
    for name, entry in found:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not parts or any(is_hidden(part) for part in parts[:-1]):
            continue
        inside = parts if entry is None else parts[:-1]
        folders.update("/".join(inside[: depth + 1]) for depth in range(len(inside)))
        if entry is None:
            continue
        name = "/".join(parts)
        if is_image_name(parts[-1]):
            entries[name] = dataclasses.replace(entry, path=name)
        else:
            ignored.append(name)
    return entries


def _without_leading_folder(listing: Listing) -> Listing:
    """Archives are often made of one folder that holds everything; it is not a class."""
    tops = {path.split("/")[0] for path in listing.folders}
    if len(tops) != 1 or tops == {"train"}:
        return listing
    prefix = tops.pop() + "/"
    if not listing.entries or any(entry.path.count("/") < 2 for entry in listing.entries):
        return listing
    entries = tuple(dataclasses.replace(entry, path=entry.path.removeprefix(prefix)) for entry in listing.entries)
    folders = frozenset(path.removeprefix(prefix) for path in listing.folders if path.startswith(prefix))
    return Listing(entries, folders, listing.ignored)
