"""An audit in words for the console, and as JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clae_dist.files import write_atomically
from data_prep.audit.find import Audit
from data_prep.audit.overlap import KINDS, MAX_PAIRS, SamplePair
from data_prep.audit.thumbnails import Thumbnails

FORMAT = "clae-dist audit 1"
_SHOWN = 8  # class names in a line


def describe(audit: Audit) -> list[str]:
    """The whole audit on one page."""
    lines = []
    for part, facts in zip(audit.parts, audit.profiles, strict=True):
        lines += ["", f"{part.set_name}, {part.split}: {facts['images']} images"]
        lines += [f"  {line}" for line in profile_lines(facts)]
    return [*lines, "", *overlap_lines(audit)]


def profile_lines(facts: dict[str, Any]) -> list[str]:
    """Sizes, modes, classes and oddities of one part."""
    lines = []
    if facts["size"]:
        small, median, large = ("{}x{}".format(*facts["size"][name]) for name in ("smallest", "median", "largest"))
        lines.append(f"pixels   all {median}" if small == large else f"pixels   {small} to {large}, median {median}")
        lines.append("modes    " + ", ".join(f"{name} {count}" for name, count in facts["modes"].items()))
    classes = facts["classes"]
    if "largest" in classes:
        text = "{} {} (largest) to {} {} (smallest), {:g} : 1".format(
            *classes["largest"], *classes["smallest"], classes["imbalance"]
        )
        even = f"all {classes['largest'][1]} images" if classes["imbalance"] == 1 else text
        lines.append(f"classes  {classes['number']}: {even}")
    if classes["empty"]:
        more = f" and {len(classes['empty']) - _SHOWN} more" if len(classes["empty"]) > _SHOWN else ""
        lines.append(f"EMPTY    {len(classes['empty'])} classes have no image: {', '.join(classes['empty'][:_SHOWN])}{more}")
    if classes["unlabelled"]:
        lines.append(f"labels   {classes['unlabelled']} images have none")
    lines += [f"odd      {count} images {_verb(name)}{name}" for name, count in facts["odd"].items() if count]
    if facts["unreadable"]:
        lines.append(f"BROKEN   {facts['unreadable']} images cannot be decoded")
    return lines


def _verb(name: str) -> str:
    return "with a " if name.startswith("short side") else ""


def overlap_lines(audit: Audit) -> list[str]:
    """Lines about the overlap between parts; copies within a part; label conflicts."""
    lines = []
    for s, t, found in audit.leaks():
        of, other = audit.parts[s], audit.parts[t]
        lines.append(f"LEAKAGE  {found['near']} images of {of.name} are in {other.name}: {counted(found)}.")
    if not lines and len(audit.parts) > 1:
        lines.append("No image of one split is in another.")
    for number, part in enumerate(audit.parts):
        within = {kind: int(audit.overlaps[kind][number, number]) for kind in KINDS}
        if any(within.values()):
            lines.append(f"copies   {within['near']} images of {part.name} have a copy in it: {counted(within)}.")
    if not audit.near_is_complete:
        lines.append(
            f"NOTE     the images look too much alike for --near-bits {audit.near_bits}: the search stopped after "
            f"{MAX_PAIRS / 1e6:g} million near pairs, and near copies are at least as many as said. Use fewer bits."
        )
    exact, near = (int(audit.conflicts[kind].sum()) for kind in ("pixels", "near"))
    if near:
        lines.append(f"LABELS   {near} images have a copy in another class: {exact} the same pixels, {near - exact} nearly.")
    return lines


def counted(found: dict[str, int]) -> str:
    """Such as 3 the same file, 2 the same pixels, 7 nearly: every image once, by the surest way."""
    parts = (
        (found["file"], "the same file"),
        (found["pixels"] - found["file"], "the same pixels"),
        (found["near"] - found["pixels"], "nearly"),
    )
    return ", ".join(f"{count} {how}" for count, how in parts if count)


def as_json(audit: Audit, images: Thumbnails) -> dict[str, Any]:
    """The audit for scripts. Counts of "near" hold those of "pixels", and these those of "file"."""
    parts = [{"set": part.set_name, "split": part.split} for part in audit.parts]
    return {
        "format": FORMAT,
        "near_bits": audit.near_bits,
        "near_is_complete": audit.near_is_complete,
        "sets": [
            {**own, "folder": str(part.manifest.folder), "digest": part.manifest.digest, **facts}
            for own, part, facts in zip(parts, audit.parts, audit.profiles, strict=True)
        ],
        "leakage": [{"of": parts[s], "in": parts[t], **found} for s, t, found in audit.leaks()],
        "copies_within": [
            {**own, **{kind: int(audit.overlaps[kind][number, number]) for kind in KINDS}} for number, own in enumerate(parts)
        ],
        "label_conflicts": {kind: int(audit.conflicts[kind].sum()) for kind in KINDS},
        "pairs": [_pair(pair, images) for pair in audit.pairs],
        "label_conflict_pairs": [_pair(pair, images) for pair in audit.conflict_pairs],
    }


def _pair(pair: SamplePair, images: Thumbnails) -> dict[str, Any]:
    how = {"kind": pair.kind, "bits": pair.bits, "mirrored": pair.mirrored}
    return {**how, "first": images.place(pair.first), "second": images.place(pair.second)}


def write_list(path: Path, audit: Audit, images: Thumbnails) -> int:
    """One JSON object a line for every image with a copy, a conflict or broken bytes. Returns the number of lines."""
    any_copy = audit.copies["near"].any(axis=1) | audit.conflicts["near"]
    any_copy[list(audit.unreadable)] = True
    listed = np.flatnonzero(any_copy).tolist()
    write_atomically(path, "".join(_lines(listed, audit, images)).encode())
    return len(listed)


def _lines(listed: list[int], audit: Audit, images: Thumbnails) -> Iterator[str]:
    for at in listed:
        line = images.place(at)
        if at in audit.unreadable:
            line["unreadable"] = audit.unreadable[at]
        for kind in KINDS:
            line[kind] = [
                {"set": audit.parts[t].set_name, "split": audit.parts[t].split}
                for t in np.flatnonzero(audit.copies[kind][at]).tolist()
            ]
        line["label_conflict"] = next((kind for kind in KINDS if audit.conflicts[kind][at]), None)
        yield json.dumps(line, ensure_ascii=False) + "\n"
