"""The classes of a set, derived from the labels of its images; a class without images does not exist."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping

import numpy as np


def classes_of(labels: Collection[str]) -> tuple[str, ...]:
    """The distinct labels, sorted by value if all are integers, otherwise as text."""
    spelling = one_spelling(labels)
    names = set(spelling.values())
    return tuple(sorted(names, key=int) if all(map(is_number, names)) else sorted(names))


def is_number(label: str) -> bool:
    return label.isascii() and label.isdigit()


def one_spelling(names: Iterable[str]) -> dict[str, str]:
    """Map each name to the class that it counts as: names that differ in Unicode form (NFC, NFD) alone are one class."""
    by_form: dict[str, list[str]] = {}
    for name in names:
        by_form.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return {name: same[0] if len(set(same)) == 1 else form for form, same in by_form.items() for name in same}


def places_of(names: Iterable[str], classes: Collection[str]) -> dict[str, int]:
    """The position of each name in `classes`. Raises KeyError for a name that is not there in any spelling."""
    exact = {name: place for place, name in enumerate(classes)}
    by_form = {unicodedata.normalize("NFC", name): place for name, place in exact.items()}
    return {name: exact[name] if name in exact else by_form[unicodedata.normalize("NFC", name)] for name in names}


def renumbered(labels: np.ndarray, names: Mapping[int, str], classes: Collection[str]) -> np.ndarray:
    """int64 labels as positions in `classes`, where label n is called `names[n]`; negative ones (no label) become -1."""
    places = places_of(names.values(), classes)
    distinct, where = np.unique(labels, return_inverse=True)
    ours = np.array([places[names[label]] if label >= 0 else -1 for label in distinct.tolist()], np.int64)
    return ours[where]
