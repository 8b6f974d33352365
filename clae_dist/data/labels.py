"""The label of one sample, from the bytes of KEY.cls or KEY.json: an integer, a name, or none."""

from __future__ import annotations

import json
import re
from typing import Any

NONE = -1
_LARGEST = 2**62
_LONGEST_NAME = 200  # characters of a class; more is a caption
_KEYS = ("label", "labels", "cls", "class_id", "class_index", "class", "target", "class_name")


class OddLabelError(ValueError):
    """A label that is neither a name nor a non-negative integer. The message is the reason."""


def label_in_text(data: bytes) -> int | str:
    """A label from KEY.cls: `3`, `3.0` or a name; -1 for none. Raises OddLabelError."""
    return _of_text(data.decode("utf-8", "replace").strip())


def label_in_json(data: bytes) -> int | str:
    """A label from KEY.json: a number or text by itself, or in an object as `label`, `cls`, …; -1 for none.

    Of several such keys, the first with an integer is used, else the first. Raises OddLabelError.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise OddLabelError("no JSON") from None
    if isinstance(record, dict):
        given = [record[key] for key in _KEYS if record.get(key) is not None]
        record = next((value for value in given if type(value) is int), given[0] if given else None)
    elif isinstance(record, list):  # metadata of another kind
        return NONE
    return NONE if record is None else _of_value(record)


def _of_value(value: Any) -> int | str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise OddLabelError("several labels" if isinstance(value, list) else f"{type(value).__name__} for a label")
    if isinstance(value, float) and not value.is_integer():
        raise OddLabelError(f"{value} is no integer")
    return _of_text(value.strip()) if isinstance(value, str) else _checked(int(value))


def _of_text(text: str) -> int | str:
    if re.fullmatch(r"[+-]?[0-9]{1,30}(\.0*)?", text):
        return _checked(int(text.split(".")[0]))
    if re.fullmatch(r"[+-]?[0-9]+\.[0-9]+", text):
        raise OddLabelError(f"{text[:20]} is no integer")
    if re.fullmatch(r"[+-]?[0-9.]+([\s,;]+[+-]?[0-9.]+)+", text):
        raise OddLabelError(f"several labels: {text[:20]!r}")
    if not text:
        raise OddLabelError("it is empty")
    if len(text) > _LONGEST_NAME or not text.isprintable():
        raise OddLabelError("no name of a class" + (f": {len(text)} characters" if len(text) > _LONGEST_NAME else ""))
    return text


def _checked(number: int) -> int:
    if not NONE <= number < _LARGEST:
        raise OddLabelError(f"{number} is {'negative' if number < 0 else 'too large'}")
    return number
