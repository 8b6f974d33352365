"""A folder of images on disk; symbolic links are followed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from clae_dist.data.image_names import is_hidden, is_image_name
from clae_dist.errors import DataError
from data_prep.sources.entry import ORIGINAL_BYTES, Entry, Listing, Report


class FolderSource:
    """A folder of class folders, or with train/ and test/ that hold some, or of images alone."""

    pixels = ORIGINAL_BYTES

    def __init__(self, path: Path) -> None:
        self.paths: tuple[Path, ...] = (path,)
        self.name = path.resolve().name

    @cached_property
    def _listing(self) -> tuple[Listing, str]:
        entries, ignored, skipped, folders, digest = [], [], [], set(), hashlib.sha256()
        for relative, item in _walk(self.paths[0]):
            if item.is_dir() and is_hidden(item.name):
                skipped.append(relative)
            elif item.is_dir():
                folders.add(relative)
            elif not is_image_name(item.name):
                ignored.append(relative)
            elif not item.is_file():
                raise DataError(f"{item.path} is a broken link or no plain file; remove it or put the image there.")
            else:
                status = item.stat()
                entries.append(Entry(relative, status.st_size, item.path))
                digest.update(f"{relative}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        digest.update(json.dumps(sorted(folders)).encode())
        entries.sort(key=lambda entry: entry.path)
        return Listing(tuple(entries), frozenset(folders), tuple(ignored), tuple(skipped)), digest.hexdigest()

    @property
    def holds_images(self) -> bool:
        return bool(self._listing[0].entries)

    def fingerprint(self) -> str:
        """Over the names, sizes and modification times of all images, not over their bytes."""
        return self._listing[1]

    def listing(self, _scratch: Path, _report: Report, /) -> Listing:
        return self._listing[0]


def _walk(root: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Everything below `root`, in order of name, with relative paths; hidden folders without what is in them.

    Raises DataError for folders linked in circles.
    """
    seen: set[tuple[int, int]] = set()
    pending = [(str(root), "")]
    while pending:
        folder, prefix = pending.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            raise DataError(f"{folder} is reached twice through links; remove one of them.")
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as items:
            for item in sorted(items, key=lambda item: item.name):
                yield prefix + item.name, item
                if item.is_dir() and not is_hidden(item.name):
                    pending.append((item.path, prefix + item.name + "/"))
