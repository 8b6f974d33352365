"""Comparison of runs: their summaries side by side, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clae_dist.config import Config
from clae_dist.config.sharing import shareable
from clae_dist.errors import ConfigError
from clae_dist.escape import shown
from clae_dist.keys import flatten
from clae_dist.report.record import read_record, summarise, summary_table
from clae_dist.runs.folder import RunFolder

_OF_EVERY_RUN = ("name", "run_dir")  # settings that differ between any two runs


def check_distinct(folders: Sequence[Path], argument: str) -> None:
    """Raise ConfigError for a run that is named twice; `argument` names it in the message."""
    resolved = [folder.resolve() for folder in folders]
    if twice := next((folder for folder in resolved if resolved.count(folder) > 1), None):
        raise ConfigError(f"{argument} names {str(twice)!r}, which is in the table already; name another run.")


def check_one_set(summaries: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError for runs whose images differ by the digest of the manifest."""
    known = [(str(one.get("run_dir")), str(one["manifest_digest"])) for one in summaries if one.get("manifest_digest")]
    for folder, digest in known:
        first_folder, first = known[0]
        if digest != first:
            raise ConfigError(
                f"{first_folder} was trained on the images {first[:12]}, {folder} on {digest[:12]} (digest of the manifest), "
                "so their results cannot be compared; name runs of one set (manifest_digest in each run.json tells)."
            )


def differences(configs: Sequence[Config]) -> dict[str, list[Any]]:
    """The settings that are not equal in all configurations: a value for each, None where a configuration lacks the key."""
    flats = [flatten(shareable(config)) for config in configs]
    keys = dict.fromkeys(key for flat in flats for key in flat if key not in _OF_EVERY_RUN)
    values = {key: [flat.get(key) for flat in flats] for key in keys}
    return {key: of_each for key, of_each in values.items() if any(value != of_each[0] for value in of_each)}


def compare_runs(folders: Sequence[Path]) -> Iterator[str]:
    """The lines of the comparison of runs. Raises ConfigError for a folder that is no run, and for runs of different sets."""
    check_distinct(folders, "RUN")
    summaries = [_with_existing_report(summarise(read_record(folder))) for folder in folders]
    check_one_set(summaries)
    differ = differences([RunFolder(folder).read_config() for folder in folders])
    rows = [(key, [_text(value) for value in values]) for key, values in differ.items()]
    yield from summary_table(*summaries, more_rows=rows).split("\n")


def _with_existing_report(summary: dict[str, Any]) -> dict[str, Any]:
    return {**summary, "report": summary["report"] if Path(summary["report"]).is_file() else None}


def _text(value: Any) -> str:
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return shown(text if len(text) <= 40 else f"…{text[-39:]}")
