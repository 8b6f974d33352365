"""The model card in README.md of an export: data, licence, settings, results with intervals, limits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clae_dist.config import Config
from clae_dist.data.manifest import FILE_NAME, Manifest, load_manifest
from clae_dist.data.urls import local_path, scheme
from clae_dist.errors import DataError
from clae_dist.escape import shown
from clae_dist.evaluation.interval import interval_text
from clae_dist.evaluation.protocol import headlines
from clae_dist.evaluation.stored import read_evaluation
from clae_dist.keys import flatten
from clae_dist.runs.folder import RunFolder

_MOST = 300  # letters of a cell
_SETTINGS = re.compile(
    r"method\.|objective\.(name|temperature)|attack\.(name|norm|epsilon|unit|steps)|augment\.(crop_scale|jitter)"
    r"|batch\.global_size|train\.(epochs|precision|ema_decay)|model\.(init|stem|norm)$|evaluation\.route|seed"
    r"|optim\.(name|learning_rate|weight_decay)|data\.image_size"
)


def card(config: Config, run_dir: Path, description: Mapping[str, Any]) -> str:
    """The sections of the card for a run whose export `description` (config.json) describes."""
    return f"""
## Data

{_data(config, description)}

## Settings

{_table(("setting", "value"), _settings(config, description))}

## Results

{_results(run_dir, description["images_seen"])}

## Limits

- The encoder has learned from this set, and was evaluated on the set in the table alone. Measure it on your own images before
  you use it, and again when they change (`clae monitor`).
- Intervals cover the choice of the test images, not the seed of the run: another seed may differ by more.
- Accuracy under attack is known for the attacks in the table alone; without a `robust` row, nothing is known about it.
- What the images show, and how much of each, is not examined here. `python -m data_prep audit` reports duplicates, overlap of
  the splits, and damaged images.
"""


def _data(config: Config, description: Mapping[str, Any]) -> str:
    digest = description["manifest_digest"]
    manifest = _local_manifest(config)
    if manifest is None or manifest.digest != digest:
        where = "is not on this machine" if manifest is None else "has changed since, or is another one"
        return f"The set of images {where}: its name and licence are not stated. Its digest is `{digest or 'unknown'}`."
    splits = ", ".join(f"{manifest.num_samples(split):,} in {split}" for split in manifest.splits)
    rows = [
        ("set", manifest.name),
        ("source", manifest.source),
        ("licence of the images", manifest.licence),
        ("images", splits),
        ("classes", f"{len(manifest.classes)}, {'used' if config.method.needs_labels else 'not used'} in training"),
        ("digest of the manifest", manifest.digest),
    ]
    mixed = [("mixed with", f"{len(config.data.mixture)} further sets (data.mixture)")] if config.data.mixture else []
    return f"{_table(('', ''), [*rows, *mixed])}\n\nWho publishes the weights states their licence."


def _local_manifest(config: Config) -> Manifest | None:
    """The manifest of the run's set, where it is a folder here."""
    text = config.data.shards
    if not text or scheme(text) or "::" in text:
        return None
    try:
        folder = Path(local_path(text))
        return load_manifest(folder) if (folder / FILE_NAME).is_file() else None
    except (DataError, OSError, ValueError):
        return None


def _settings(config: Config, description: Mapping[str, Any]) -> Iterable[tuple[object, object]]:
    settings = {key: value for key, value in flatten(config).items() if _SETTINGS.match(key)}
    if not config.method.uses_attack:
        settings = {key: value for key, value in settings.items() if not key.startswith("attack.")}
    yield from ((f"`{key}`", value) for key, value in settings.items())
    for key in ("config_digest", "weights"):
        yield f"`{key}`", description[key]
    for key in ("initial_weights", "parent", "pseudo_labels"):
        yield from ((f"`{key}.{name}`", value) for name, value in description[key].items())


def _results(run_dir: Path, images_seen: int) -> str:
    """The headline of each protocol, if evaluation.json is of this checkpoint."""
    evaluation, problem = read_evaluation(RunFolder(run_dir).evaluation_file)
    if evaluation is None or evaluation["images_seen"] != images_seen:
        reason = problem and "its evaluation.json cannot be read"
        reason = reason or ("it was not evaluated" if evaluation is None else "its evaluation is of another checkpoint")
        return f"None: {reason}. `clae evaluate RUN`, then `clae export RUN` again."
    rows = []
    for name, about in evaluation["protocols"].items():
        found = headlines(evaluation["results"], name, about.get("unit", "%"))
        if "after" in found:
            before = found["before"].text(2) if "before" in found else "–"
            interval = interval_text(found["after"].interval)
            rows.append((about["title"], before, found["after"].text(2), interval, about["description"]))
    images = f"{evaluation['test_images']:,} test images of the set `{evaluation['manifest_digest'][:12]}`"
    heading = ("protocol", "before pretraining", "after", "95 % interval", "how")
    return f"{_table(heading, rows)}\n\nOn {images}." if rows else f"No accuracies; {images}."


def _table(heading: tuple[object, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *(tuple(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _cell(value: object) -> str:
    """A value in one cell: names and licences come from the set and may hold anything."""
    text = " ".join(shown(value).split())
    text = text if len(text) <= _MOST else text[:_MOST] + "…"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("[", "\\[")
