"""Labels in the shards, names (KEY.cls is a text) or numbers, become positions among the classes of the whole set."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np

from clae_dist.data.classes import classes_of, is_number, places_of, renumbered
from clae_dist.errors import DataError
from clae_dist.files import file_sha256
from clae_dist.storage import writing
from data_prep.index_shard import IndexResult
from data_prep.write import write_index


def label_classes(
    given: tuple[str, ...], results: dict[str, IndexResult], parts: Path
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes of the set, and what its labels are called in that order.

    The classes are those `given`, else the labels that there are. Where all labels are numbers, those `given` are the names of
    0, 1, …; in a set with names the numbers are names, too. Raises DataError for a label that is not `given`.
    """
    first = {name: shard for shard, result in sorted(results.items(), reverse=True) for name in _names(result, parts).values()}
    names = classes_of(first)
    if not given:
        return names, names
    if all(map(is_number, names)):
        largest = max(map(int, names), default=-1)
        if largest >= len(given):
            shard = first[str(largest)]
            raise DataError(f"{shard} has the label {largest}, but --classes names only 0 to {len(given) - 1}; add the others.")
        return given, tuple(map(str, range(len(given))))
    try:
        places_of(names, given)
    except KeyError as error:
        (unknown,) = error.args
        shard = next(shard for name, shard in first.items() if unicodedata.normalize("NFC", name) == unknown)
        raise DataError(f"{shard} has the label {unknown!r}, which --classes does not name; add it.") from None
    return given, given


def place_index(result: IndexResult, parts: Path, folder: Path, names: tuple[str, ...]) -> IndexResult:
    """Moves the index of a shard from `parts` to where it belongs, its labels as positions among `names`."""
    made, place = parts / result.shard.index_name, folder / result.shard.index_name
    rows = np.load(made, allow_pickle=False)
    labels = renumbered(rows[:, 2], _names(result, parts), names)
    if (labels == rows[:, 2]).all():
        with writing(place):
            os.replace(made, place)
        return result
    rows[:, 2] = labels
    temporary = parts / f"named-{made.name}"  # what is in `parts` stays as its record says: a kill here does no harm
    write_index(temporary, rows)
    with writing(place):
        os.replace(temporary, place)
    return replace(result, shard=replace(result.shard, index_sha256=file_sha256(place)))


def _names(result: IndexResult, parts: Path) -> dict[int, str]:
    """The names of the labels that a shard's images have: their texts, else their numbers."""
    labels = np.unique(np.load(parts / result.shard.index_name, allow_pickle=False)[:, 2]).tolist()
    return {label: result.names[label] if result.names else str(label) for label in labels if label >= 0}
