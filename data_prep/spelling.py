"""Class names that differ in Unicode's form alone (NFC of most systems, NFD of macOS's archives) are one class. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from clae_dist.data.classes import one_spelling
from data_prep.sources.entry import Entry, Layout

_Images = dict[str, dict[str, list[tuple[str, Entry]]]]  # by split and class


def merge_spellings(images: _Images, classes: Iterable[str] = ()) -> tuple[_Images, list[str]]:
    """The images by split and class with one spelling of each class, and what a user should know.

    A class with one spelling everywhere keeps it, whichever it is.
    """
    spelling = one_spelling(dict.fromkeys([*classes, *(name for groups in images.values() for name in groups)]))
    several = sorted(name for name, count in Counter(spelling.values()).items() if count > 1)
    if not several:
        return images, []
    merged: _Images = {}
    for split, groups in images.items():
        into = merged.setdefault(split, {})
        for name in sorted(groups):
            into.setdefault(spelling[name], []).extend(groups[name])
    return merged, [f"The class {name} is spelled in two forms of Unicode (NFC, NFD), which are one class." for name in several]


def one_spelling_each(layout: Layout) -> Layout:
    """A layout whose classes have one spelling each, in their order."""
    images, notes = merge_spellings(layout.images, layout.classes)
    if not notes:
        return layout
    spelling = one_spelling(layout.classes)
    classes = tuple(dict.fromkeys(spelling[name] for name in layout.classes))
    return replace(layout, classes=classes, images=images, notes=(*layout.notes, *notes))
