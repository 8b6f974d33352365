"""Results of a run that are read back, checked where they are read: evaluation.json, summary.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clae_dist.config import ConfigError
from clae_dist.reading import (
    Check,
    MissingError,
    ReadError,
    expect,
    is_count,
    is_list_of,
    is_number,
    is_text,
    or_none,
    read_object,
)
from clae_dist.runs.folder import RunFolder

_ACCURACIES = ("knn_before", "knn_after", "linear_before", "linear_after")
_INTERVALS = tuple(f"{key}_interval_percent" for key in _ACCURACIES)
_MOST_NEIGHBOURS = 64


def _is_percent(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 100


def _is_interval(value: Any) -> bool:
    return is_list_of(_is_percent)(value) and len(value) == 2


def _is_label(value: Any) -> bool:
    return value == -1 or is_count(value)


def _is_query(value: Any) -> bool:
    if not isinstance(value, dict) or not is_count(value.get("id")) or not _is_label(value.get("label")):
        return False
    ids: Any = value.get("neighbour_ids")
    labels: Any = value.get("neighbour_labels")
    return is_list_of(is_count)(ids) and is_list_of(_is_label)(labels) and 0 < len(ids) == len(labels) <= _MOST_NEIGHBOURS


_EVALUATION: dict[str, Check] = {
    **dict.fromkeys(("images_seen", "num_classes", "train_images", "bank_images", "test_images"), is_count),
    **dict.fromkeys(_ACCURACIES, or_none(_is_percent)),
    "manifest_digest": is_text,
    "neighbours": lambda value: is_list_of(_is_query)(value) and len(value) <= _MOST_NEIGHBOURS,
}
_OPTIONAL: dict[str, Check] = {
    "wall_s": or_none(is_number),
    "step": is_count,
    "left_out": lambda value: isinstance(value, dict),
    "unlabelled": lambda value: isinstance(value, dict) and all(map(is_count, value.values())),
    "no_accuracies": is_text,
    **dict.fromkeys(_INTERVALS, or_none(_is_interval)),
}
_WITH_ACCURACIES: dict[str, Check] = {
    **dict.fromkeys(_ACCURACIES, _is_percent),
    "num_classes": lambda value: is_count(value) and value > 0,
    "knn_k": is_count,
    "knn_temperature": is_number,
}
_SUMMARY: dict[str, Check] = {
    **dict.fromkeys(("method", "name", "report", "checkpoints"), or_none(is_text)),
    "images_seen": or_none(is_count),
    **dict.fromkeys(("images_per_s", "wall_s", "loss", "loss_clean"), or_none(is_number)),
    **dict.fromkeys(_ACCURACIES, or_none(_is_percent)),
    **dict.fromkeys(_INTERVALS, or_none(_is_interval)),
}


def read_evaluation(path: Path) -> tuple[dict[str, Any] | None, str]:
    """An evaluation.json, None without one or with a damaged one; and why it is ignored, "" where it is not."""
    try:
        content = read_object(path)
        expect(content, _EVALUATION, _OPTIONAL)
        if content["knn_after"] is not None:
            expect(content, _WITH_ACCURACIES)
    except MissingError:
        return None, ""
    except ReadError as error:
        return None, f"{path} is damaged ({error}) and ignored; `clae evaluate {path.parent}` writes it again."
    return content, ""


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json of a run. Raises ConfigError when it has no report yet, or a damaged one."""
    try:
        content = read_object(RunFolder(run_dir).summary_file)
        expect(content, {}, _SUMMARY)
    except ReadError as error:
        raise ConfigError(
            f"RUN is {str(run_dir)!r}, whose summary.json cannot be read ({error}); `clae report {run_dir}` writes it."
        ) from None
    return content
