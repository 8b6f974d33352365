"""Checked readers of evaluation.json and summary.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clae_dist.errors import ConfigError
from clae_dist.evaluation.protocol import FORMAT, WHEN
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

_MAX_NEIGHBOURS = 64


def _is_mapping_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _is_before_and_after(value: Any) -> bool:
    return _is_mapping_of(is_number)(value) and len(value) > 0 and set(value) <= set(WHEN)


def _is_setting(value: Any) -> bool:
    return is_number(value) or is_text(value) or (isinstance(value, list) and all(map(_is_setting, value)))


def _is_protocol(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_mapping_of(_is_setting)(value.get("settings")):
        return False
    return all(is_text(value.get(name)) for name in ("title", "description")) and is_text(value.get("unit", "%"))


_is_results = _is_mapping_of(_is_mapping_of(_is_before_and_after))


def _is_label(value: Any) -> bool:
    return value == -1 or is_count(value)


def _is_query(value: Any) -> bool:
    if not isinstance(value, dict) or not is_count(value.get("id")) or not _is_label(value.get("label")):
        return False
    ids: Any = value.get("neighbour_ids")
    labels: Any = value.get("neighbour_labels")
    return is_list_of(is_count)(ids) and is_list_of(_is_label)(labels) and 0 < len(ids) == len(labels) <= _MAX_NEIGHBOURS


_EVALUATION: dict[str, Check] = {
    **dict.fromkeys(("images_seen", "num_classes", "train_images", "bank_images", "test_images"), is_count),
    "results": _is_results,
    "protocols": _is_mapping_of(_is_protocol),
    "manifest_digest": is_text,
    "neighbours": lambda value: is_list_of(_is_query)(value) and len(value) <= _MAX_NEIGHBOURS,
}
_OPTIONAL: dict[str, Check] = {
    "wall_s": or_none(is_number),
    "step": is_count,
    "weights": _is_mapping_of(is_text),
    "undecodable": _is_mapping_of(is_count),
    "unlabelled": _is_mapping_of(is_count),
    "details": _is_mapping_of(_is_mapping_of(_is_mapping_of(is_list_of(is_number)))),
    "no_accuracies": is_text,
    "notes": is_list_of(is_text),
}
_SUMMARY: dict[str, Check] = {
    **dict.fromkeys(("method", "name", "report", "checkpoints"), or_none(is_text)),
    "images_seen": or_none(is_count),
    **dict.fromkeys(("images_per_s", "wall_s", "loss", "loss_clean"), or_none(is_number)),
    "results": _is_results,
    "titles": _is_mapping_of(is_text),
    "units": _is_mapping_of(is_text),
}


def read_evaluation(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The content of an evaluation.json, None if it is missing or damaged; and the reason for ignoring it, or ""."""
    try:
        content = read_object(path)
        if content.get("format", 1) != FORMAT:
            raise ReadError(f"format {str(content.get('format', 1))[:20]}, this version reads {FORMAT}")
        expect(content, _EVALUATION, _OPTIONAL)
    except MissingError:
        return None, ""
    except ReadError as error:
        return None, f"{path} cannot be used ({error}) and is ignored; `clae evaluate {path.parent}` writes it again."
    return content, ""


def read_summary(run_dir: Path) -> dict[str, Any]:
    """The content of summary.json. Raises ConfigError if there is none yet or it is damaged."""
    try:
        content = read_object(RunFolder(run_dir).summary_file)
        expect(content, {}, _SUMMARY)
    except ReadError as error:
        raise ConfigError(
            f"RUN is {str(run_dir)!r}, whose summary.json cannot be read ({error}); `clae report {run_dir}` writes it."
        ) from None
    return content
