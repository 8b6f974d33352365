"""Where the split folders of a listing are: at its top, below a folder that holds them all, or nowhere. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from clae_dist.errors import DataError
from data_prep.sources.entry import Entry, Listing
from data_prep.split_names import split_of, splits_in, splits_of

ARRANGE = "arrange the images as train/CLASS/… and test/CLASS/…, or name a folder of class folders without splits"


def tops_of(entries: Sequence[Entry], root: str = "") -> set[str]:
    """The folders directly below `root` ("" or "folder/") that hold images, at any depth."""
    return {entry.path[len(root) :].split("/")[0] for entry in entries if "/" in entry.path[len(root) :]}


def find_splits(listing: Listing, where: str) -> tuple[str, dict[str, str]]:
    """The folder ("" or "folder/") that holds the split folders, and the split of each; ("", {}) without split folders.

    Folders that hold everything are looked into. Raises DataError for folders that are all called like splits, but not so
    that they can be told from classes.
    """
    root, found = "", ("", dict[str, str]())
    while True:
        tops = tops_of(listing.entries, root)
        direct = any("/" not in entry.path[len(root) :] for entry in listing.entries)
        splits = {} if direct or not tops else splits_of(tops)
        if splits and (len(tops) > 1 or _is_split(tops, root, listing.entries)):
            found = (root, splits)
        if len(tops) != 1 or direct:
            break
        root += tops.pop() + "/"
    if not found[1]:
        _refuse_names(listing.entries, where)
    return found


def _is_split(tops: set[str], root: str, entries: Sequence[Entry]) -> bool:
    """True if a single folder is a split rather than a class, by its name, or by a longer name and class folders in it."""
    (top,) = tops
    return bool(split_of(top)) or all("/" in entry.path[len(root) + len(top) + 1 :] for entry in entries)


def _refuse_names(entries: Sequence[Entry], where: str) -> None:
    tops = tops_of(entries)
    if tops and all(splits_in(top) for top in tops):
        names = ", ".join(f"{top}/" for top in sorted(tops)[:5])
        raise DataError(
            f"{where} has no class folders that are not called like splits ({names}); call splits train/ and test/, with class "
            "folders in them, and classes by other names."
        )


def class_root(entries: Sequence[Entry], folder: str) -> str:
    """Where the class folders of a split are: `folder` ("seg_train/"), or a folder of a split's name that is alone in it."""
    split = splits_in(folder)
    while True:
        inside = [entry for entry in entries if entry.path.startswith(folder)]
        tops = tops_of(inside, folder)
        if len(tops) != 1 or any("/" not in entry.path[len(folder) :] for entry in inside):
            return folder
        (top,) = tops
        if splits_in(top) != split:
            return folder
        folder += f"{top}/"


def refuse_splits_inside(listing: Listing, where: str) -> None:
    """Raises DataError for split folders among or inside of class folders: their images would become a class, or mixed."""
    for top in sorted(top for top in tops_of(listing.entries) if split_of(top)):
        holds_classes = all(entry.path.count("/") > 1 for entry in listing.entries if entry.path.startswith(top + "/"))
        others = [entry for entry in listing.entries if not entry.path.startswith(top + "/")]
        if holds_classes and any(entry.path.count("/") == 1 for entry in others):
            raise DataError(f"{where} has {top}/, which holds folders of images, beside class folders; {ARRANGE}.")
    inside: dict[str, set[str]] = {}
    for path in listing.folders:
        parent, _, name = path.rpartition("/")
        if parent and split_of(name):
            inside.setdefault(parent, set()).add(name)
    for parent, names in sorted(inside.items()):
        if len({split_of(name) for name in names}) > 1 or any(split_of(name) != "train" for name in names):
            shown = " and ".join(f"{parent}/{name}" for name in sorted(names))
            raise DataError(
                f"{where} has the split folder{'s' * (len(names) > 1)} {shown} inside of a class folder; {ARRANGE}."
            )
