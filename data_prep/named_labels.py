"""Labels that are names in the shards (KEY.cls is a text) become positions among the classes of the whole set."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from clae_dist.data.manifest import DataError
from clae_dist.files import file_sha256
from clae_dist.storage import writing
from data_prep.index_shard import IndexResult
from data_prep.write import write_index


def named_classes(given: tuple[str, ...], results: dict[str, IndexResult], parts: Path) -> tuple[str, ...]:
    """The classes where a shard has names for labels: those `given`, else all names, sorted; () where all are numbers.

    In a set with names the numbers of other shards are names, too. Raises DataError for a name that is not `given`.
    """
    if not any(result.names for result in results.values()):
        return ()
    first = {name: shard for shard, result in sorted(results.items(), reverse=True) for name in _names(result, parts)}
    unknown = sorted(first.keys() - set(given)) if given else []
    if unknown:
        raise DataError(f"{first[unknown[0]]} has the label {unknown[0]!r}, which --classes does not name; add it.")
    return given or tuple(sorted(first))


def place_index(result: IndexResult, parts: Path, folder: Path, classes: tuple[str, ...]) -> IndexResult:
    """Moves the index of a shard from `parts` to where it belongs, names as positions among `classes`; (): as it is."""
    made, place = parts / result.shard.index_name, folder / result.shard.index_name
    names, positions = _names(result, parts), {name: position for position, name in enumerate(classes)}
    if not classes or all(positions[name] == label for name, label in names.items()):
        with writing(place):
            os.replace(made, place)
        return result
    rows = np.load(made, allow_pickle=False)
    ours = np.full(max(names.values()) + 2, -1, np.int64)  # the last for -1, no label
    for name, label in names.items():
        ours[label] = positions[name]
    rows[:, 2] = ours[rows[:, 2]]
    temporary = parts / f"named-{made.name}"  # what is in `parts` stays as its record says: a kill here does no harm
    write_index(temporary, rows)
    with writing(place):
        os.replace(temporary, place)
    return replace(result, shard=replace(result.shard, index_sha256=file_sha256(place)))


def _names(result: IndexResult, parts: Path) -> dict[str, int]:
    """The labels that a shard's images have, by name."""
    labels = np.unique(np.load(parts / result.shard.index_name, allow_pickle=False)[:, 2])
    return {result.names[label] if result.names else str(label): int(label) for label in labels if label >= 0}
