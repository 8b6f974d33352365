"""The audit as one HTML file with pairs of pictures inside, its figures as JSON, and a list of images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clae_dist.errors import DataError
from clae_dist.files import make_folders, write_atomically
from clae_dist.page import data_uri, render
from data_prep.audit.find import Audit
from data_prep.audit.overlap import SamplePair
from data_prep.audit.poison import Suspect, as_facts, picture_uri, said, suspect_lines, write_patch_list
from data_prep.audit.profile import oddities
from data_prep.audit.summary import as_json, overlap_lines, profile_lines, write_list
from data_prep.audit.thumbnails import Thumbnails

PAGE, DATA, LIST, PATCHES = "audit.html", "audit.json", "images.jsonl", "patches.jsonl"
_KINDS = {"file": "the same file", "pixels": "the same pixels", "near": "near"}


def check_target(folder: Path, sets: Sequence[Path]) -> None:
    """Raise DataError for a folder that cannot take the report or is one of the sets, before hours of reading."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--report {folder} is a file; name a folder.")
    for one in sets:
        if folder.resolve().is_relative_to(one.resolve()):
            raise DataError(f"--report {folder} lies inside the set {one}; name a folder elsewhere.")


def write_report(audit: Audit, folder: Path, suspects: Sequence[Suspect] | None = None) -> Path:
    """Write audit.html, audit.json and images.jsonl into `folder`, each atomically; return the path of the page.

    `suspects`: the patches that were found, if they were searched; their images are listed in patches.jsonl.
    """
    make_folders(folder)
    images = Thumbnails(audit)
    listed = write_list(folder / LIST, audit, images)
    facts = as_json(audit, images)
    if suspects is not None:
        write_patch_list(folder / PATCHES, suspects, images)
        facts["patches"] = as_facts(suspects)
    write_atomically(folder / DATA, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(folder / PAGE, _page(audit, images, listed, suspects).encode())
    return folder / PAGE


def _page(audit: Audit, images: Thumbnails, num_listed: int, suspects: Sequence[Suspect] | None) -> str:
    names = " and ".join(dict.fromkeys(part.set_name for part in audit.parts))
    return render(
        "data_prep",
        "audit.html",
        title=f"Audit of {names}",
        findings=[_finding(line) for line in _lines(audit, suspects)],
        patches=[_patch(audit, suspect, images) for suspect in suspects or ()],
        patch_file=PATCHES,
        near_bits=audit.near_bits,
        num_listed=num_listed,
        list_file=LIST,
        profiles=[
            {"title": f"{part.set_name}, {part.split}: {facts['images']} images", "lines": profile_lines(facts)}
            for part, facts in zip(audit.parts, audit.profiles, strict=True)
        ],
        pairs=_pairs(audit, images),
        odd=_odd(audit, images),
        unreadable=list(_unreadable(audit, images)),
    )


def _lines(audit: Audit, suspects: Sequence[Suspect] | None) -> list[str]:
    patches = [] if suspects is None else suspect_lines(audit, suspects)
    return [*(overlap_lines(audit) or ["No copies were found."]), *patches]


def _patch(audit: Audit, suspect: Suspect, images: Thumbnails) -> dict[str, Any]:
    """A patch, and some of its images."""
    patch = suspect.patch
    some = patch.images[np.linspace(0, len(patch.images) - 1, min(audit.limit_pictures, len(patch.images))).astype(int)]
    return {
        "alarm": suspect.verdict == "poison",
        "text": said(audit, suspect),
        "source": picture_uri(patch),
        "images": [_image(at, images) for at in some.tolist()],
    }


def _finding(line: str) -> dict[str, Any]:
    word, _, rest = line.partition("  ")
    text = f"{word.capitalize()}: {rest.strip()}" if rest else line
    return {"text": text, "alarm": line.startswith(("LEAKAGE", "LABELS", "POISON"))}


def _pairs(audit: Audit, images: Thumbnails) -> dict[str, list[dict[str, Any]]]:
    """Pairs of copies by heading: which parts, and what the two have in common."""
    part = audit.table["part"]
    pairs: dict[str, list[SamplePair]] = {}
    for pair in audit.pairs:
        s, t = audit.parts[part[pair.first]], audit.parts[part[pair.second]]
        where = f"Within {s.name}" if s == t else f"{s.name} and {t.name}"
        pairs.setdefault(f"{where}: {_KINDS[pair.kind]}", []).append(pair)
    if audit.conflict_pairs:
        pairs["The same picture under two labels"] = list(audit.conflict_pairs)
    return {title: [_pair(pair, images) for pair in some] for title, some in pairs.items()}


def _pair(pair: SamplePair, images: Thumbnails) -> dict[str, Any]:
    how = f"{pair.bits} of 64 bits" + (", mirrored" if pair.mirrored else "") if pair.kind == "near" else _KINDS[pair.kind]
    return {"how": how, "first": _image(pair.first, images), "second": _image(pair.second, images)}


def _odd(audit: Audit, images: Thumbnails) -> dict[str, list[dict[str, Any]]]:
    """A few images of each oddity and part."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for number, part in enumerate(audit.parts):
        positions = np.flatnonzero((audit.table["part"] == number) & (audit.table["width"] > 0))
        for name, is_odd in oddities(audit.table[positions]).items():
            for at in positions[is_odd][: audit.limit_pictures].tolist():
                size = f"{audit.table[at]['width']}x{audit.table[at]['height']}"
                shown.setdefault(name, []).append(_image(at, images, f"{part.name}, {size}"))
    return shown


def _unreadable(audit: Audit, images: Thumbnails) -> Iterator[str]:
    for at, reason in sorted(audit.unreadable.items())[: 5 * audit.limit_pictures]:
        place = images.place(at)
        yield f"{place['name']} ({place['shard']}, row {place['row']}): {reason}"


def _image(at: int, images: Thumbnails, more: str = "") -> dict[str, Any]:
    place = images.place(at)
    words = (place["class"] or "no class", place["name"], f"{place['shard']}, row {place['row']}", more)
    return {"source": data_uri(images.thumbnail(at), "jpeg"), "words": [word for word in words if word]}
