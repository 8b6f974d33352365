"""Lists of bad images: labels that `clae finetune … noisy` doubted, and images with a patch that `audit --poison` found.

Every line names its image by the digest of the set, shard and row, so that lines can be removed and lists be joined by hand.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clae_dist.data.manifest import Manifest, Shard
from clae_dist.data.tar_index import stored_name
from clae_dist.errors import DataError
from clae_dist.reading import Check, ReadError, expect, is_count, is_number, is_text, or_none, parse_line, raw_lines
from data_prep.audit.scan import open_shard
from data_prep.settings import QuarantineSettings

Kind = Literal["suspect", "patch"]
_PLACE: dict[str, Check] = {"digest": is_text, "split": is_text, "shard": is_text, "row": is_count, "name": is_text}
_SUSPECT: dict[str, Check] = {
    "class": is_text,
    "guess": is_text,
    "believed": lambda value: is_number(value) and 0 <= value <= 1,
}
_PATCH: dict[str, Check] = {
    "class": or_none(is_text),
    "patch": is_count,
    "verdict": lambda value: value in ("poison", "recurring"),
}
_AGAIN = (
    "make the list again: `clae finetune RUN finetune/noisy --shards SET` writes suspects.jsonl into its run, "
    "`python -m data_prep audit SET --poison --report DIR` writes patches.jsonl"
)


@dataclass(frozen=True)
class BadImage:
    """A line of a list."""

    split: str
    shard: str
    row: int
    name: str  # in the archive
    kind: Kind
    reason: str
    where: str  # list and line, for errors


@dataclass(frozen=True)
class BadLists:
    """The content of several lists that is about one set."""

    images: tuple[BadImage, ...]
    sha256: tuple[str, ...]  # of the lists, sorted
    notes: tuple[str, ...]


def read_lists(paths: Sequence[Path], manifest: Manifest, settings: QuarantineSettings) -> BadLists:
    """The chosen images of the lists, compared with the set.

    Raises DataError for a list that is missing, empty, damaged or of another set, and for settings that choose no image.
    """
    images: list[BadImage] = []
    digests, notes, kinds = [], [], Counter[str]()
    for path in paths:
        sha256 = hashlib.sha256()
        lines = list(_lines(path, sha256))
        digests.append(sha256.hexdigest())
        of_this = [(where, line) for where, line in lines if line["digest"] == manifest.digest]
        if not of_this:
            raise DataError(
                f"{path} was made for another set: its lines name the digest {lines[0][1]['digest'][:12]}, but "
                f"{manifest.where} has {manifest.digest[:12]}. Name the set that it was made for, or {_AGAIN}."
            )
        if len(of_this) < len(lines):
            notes.append(f"{path}: {len(lines) - len(of_this):,} of {len(lines):,} lines are about other sets and are skipped.")
        kinds.update(line["verdict"] if "patch" in line else "suspect" for _, line in of_this)
        images += [_image(where, line) for where, line in of_this if _is_chosen(line, settings)]
    _check_settings(kinds, settings)
    if not images:
        raise DataError(f"no image is chosen: {_why_none(kinds, settings)}.")
    _compare(images, manifest)
    return BadLists(tuple(images), tuple(sorted(digests)), tuple(notes))


def _lines(path: Path, sha256: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the content of every line. Raises DataError, also for a file without any."""
    if not path.exists():
        raise DataError(f"--list {path} does not exist; {_AGAIN}.")
    number = 0
    try:
        for number, data in enumerate(raw_lines(path), start=1):
            sha256.update(data)
            yield f"{path}, line {number}", _parse(data)
    except ReadError as error:
        where = f"{path}, line {number}," if number else f"--list {path}"
        raise DataError(f"{where} cannot be used ({error}). Remove the line if it is yours, or {_AGAIN}.") from None
    if not number:
        raise DataError(f"{path} is empty: nothing is to be quarantined, and the set can be used as it is.")


def _parse(data: bytes) -> dict[str, Any]:
    line = parse_line(data.rstrip(b"\n") + b"\n")  # an editor may have taken the last line feed
    if line is None:
        raise ReadError("it is cut short or no JSON object")
    expect(line, _PLACE)
    if "patch" not in line and "believed" not in line:
        raise ReadError("it has neither believed, as suspects.jsonl, nor patch, as patches.jsonl")
    expect(line, _PATCH if "patch" in line else _SUSPECT)
    return line


def _is_chosen(line: dict[str, Any], settings: QuarantineSettings) -> bool:
    if "patch" in line:
        return settings.recurring or line["verdict"] == "poison"
    return bool(line["believed"] < settings.below) or settings.below == 1


def _image(where: str, line: dict[str, Any]) -> BadImage:
    if "patch" in line:
        kind, reason = "patch", f"{line['verdict']} patch {line['patch']}"
    else:
        kind, reason = "suspect", f"label {line['class']} is believed with {line['believed']}; guess {line['guess']}"
    return BadImage(line["split"], line["shard"], line["row"], line["name"], kind, reason, where)  # type: ignore[arg-type]


def _check_settings(kinds: Counter[str], settings: QuarantineSettings) -> None:
    """Raise DataError for an option that none of the lists has a line for."""
    for option, is_set in (("--below", settings.below != 1), ("--unlabel", settings.unlabel)):
        if is_set and not kinds["suspect"]:
            raise DataError(f"{option} is about suspects.jsonl, and no such list is named; add it, or remove {option}.")
    if settings.recurring and not kinds["poison"] + kinds["recurring"]:
        raise DataError("--recurring is about patches.jsonl, and no such list is named; add it, or remove --recurring.")


def _why_none(kinds: Counter[str], settings: QuarantineSettings) -> str:
    reasons = []
    if kinds["suspect"]:
        reasons.append(f"no label of {kinds['suspect']:,} is believed less than --below {settings.below:g}; use a larger one")
    if kinds["recurring"]:
        reasons.append(
            f"all {kinds['recurring']:,} images with a patch are only recurring; audit with --encoder to find poison, or look "
            "at the pictures and add --recurring"
        )
    return "; ".join(reasons)


def _compare(images: Sequence[BadImage], manifest: Manifest) -> None:
    """Raise DataError for a line about an image that the set does not have, or has under another name."""
    shards = {(split, shard.name): shard for split, shards in manifest.splits.items() for shard in shards}
    by_shard: dict[tuple[str, str], list[BadImage]] = {}
    for image in images:
        shard = shards.get((image.split, image.shard))
        if shard is None or image.row >= shard.samples:
            raise _other(image, manifest, f"has no row {image.row} in {image.shard} of the split {image.split}")
        by_shard.setdefault((image.split, image.shard), []).append(image)
    for key, listed in by_shard.items():
        _compare_names(listed, manifest, shards[key])


def _compare_names(images: Sequence[BadImage], manifest: Manifest, shard: Shard) -> None:
    index = manifest.index(shard)
    with open_shard(manifest.folder, shard) as content:
        for image in images:
            name = stored_name(content, int(index[image.row, 0]))
            if name != image.name:
                raise _other(image, manifest, f"has {name!r} in row {image.row} of {image.shard}, not {image.name!r}")


def _other(image: BadImage, manifest: Manifest, what: str) -> DataError:
    return DataError(f"{image.where}, was edited or is damaged: {manifest.where} {what}; {_AGAIN}.")
