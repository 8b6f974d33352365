"""Labels in Parquet files: which column or partition holds them, what a value means, and which classes there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import unquote

from clae_dist.data.classes import classes_of
from clae_dist.errors import DataError

_NAMES = ("label", "labels", "fine_label")
_OTHER_NAMES = ("class", "target", "cls", "class_id", "class_label", "class_name", "category")  # where no feature is a label
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"

Label = int | str | None


def partitions(name: str) -> dict[str, Label]:
    """Values by key of a Hive path such as `label=3/part-0.parquet`; the split is none of them."""
    pairs = [part.partition("=") for part in name.split("/")[:-1] if "=" in part]
    return {key: None if value in ("", _NO_PARTITION) else unquote(value) for key, _, value in pairs if not _is_split(key)}


def without_partitions(name: str) -> str:
    """The path without its Hive parts but that of the split."""
    return "/".join(part for part in name.split("/") if "=" not in part or _is_split(part.partition("=")[0]))


def _is_split(key: str) -> bool:
    return key.lower() == "split"


def label_column(path: str, columns: Collection[str], features: dict[str, dict[str, Any]], asked: str) -> str:
    """ "" where there is none. Raises DataError when it cannot be told."""
    if asked and asked not in columns:
        raise DataError(f"{path} has no column {asked} among {', '.join(columns)}; name another with --label-column.")
    if asked:
        return asked
    known = [name for name in _NAMES if name in columns]
    known = known or [name for name in columns if features.get(name, {}).get("_type") == "ClassLabel"]
    known = known or [name for name in columns if name.lower() in (*_NAMES, *_OTHER_NAMES)]
    if len(known) > 1:
        raise DataError(f"{path} has the label columns {', '.join(known)}; say which with --label-column.")
    return known[0] if known else ""


def label_of(value: Any, where: str, column: str) -> Label:
    """A value of the column as a number or a text, None without a label. Raises DataError, naming `where` it is."""
    if isinstance(value, (list, tuple)) and len(value) <= 1:
        value = value[0] if value else None
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):  # pandas has no missing integers
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (list, tuple)):
        raise DataError(f"{where} has {len(value)} labels in {column}; one label an image is expected: name another column.")
    if not isinstance(value, (int, str)):
        kind = "" if isinstance(value, float) else f" ({type(value).__name__})"
        raise DataError(f"{where} has the label {str(value)[:40]}{kind} in {column}; expected an integer or a text.")
    if isinstance(value, int) and value < -1:
        raise DataError(f"{where} has the label {value} in {column}; labels are numbers from 0 on, and -1 for none.")
    return value


def class_names(feature: dict[str, Any]) -> tuple[str, ...]:
    """The class names of a ClassLabel, or of a list of one; () for other columns."""
    inner = feature.get("feature")
    names = (inner if isinstance(inner, dict) else feature).get("names") or ()
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    return tuple(map(str, names))


def classes_in(
    path: str, named: set[tuple[str, ...]], labels: set[Label], by_folder: bool
) -> tuple[tuple[str, ...], Callable[[Label], int]]:
    """Names of the classes, and the function from a label to its number, -1 for none.

    Args: `named` holds the files' own class names; `labels` what the images have; `by_folder` whether they are Hive partitions,
    whose numbers are texts. Raises DataError, naming `path`, for labels that do not fit together.
    """
    if len(named) > 1:
        raise DataError(f"{path} and other files name different classes; are they of one set?")
    names = next(iter(named), ())
    found = {label for label in labels if label is not None}
    if names:
        wrong = [label for label in found if not isinstance(label, int) or not -1 <= label < len(names)]
        if wrong:
            raise DataError(f"{path} names {len(names)} classes, and there is the label {wrong[0]!r}; get it again.")
        if len(set(names)) < len(names):
            raise DataError(f"{path} names a class twice among its {len(names)}; name other labels: --label-column.")
        return names, lambda label: label if isinstance(label, int) else -1
    if len({type(label) for label in found}) > 1:
        raise DataError(f"{path} and other files have labels of different kinds, numbers and texts; are they of one set?")
    plain: list[Any] = sorted(label for label in found if isinstance(label, str) or label >= 0)  # hubs write -1 for "not told"
    plain = list(classes_of(plain)) if by_folder else plain
    numbers = {label: number for number, label in enumerate(plain)}
    return tuple(map(str, plain)), lambda label: numbers.get(label, -1)
