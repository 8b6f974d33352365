"""Recurring patches of the audited sets, judged by their effect on an encoder if there is one: in words, as JSON, as a list."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from clae_dist.files import write_atomically
from clae_dist.page import data_uri
from clae_dist.progress import Progress
from data_prep.audit.find import Audit
from data_prep.audit.small import read_small, view
from data_prep.audit.thumbnails import Thumbnails

if TYPE_CHECKING:
    from data_prep.audit.effect import Effect, Encoder, Judge
    from data_prep.audit.patches import Patch

_JUDGED = 20  # patches, those of most images
_LEAST_CLUSTERS, _CLUSTERS_A_CLASS, _MOST_CLUSTERS = 10, 2, 200
_PICTURE = 96  # pixels of a patch's longer side on the page, at least


@dataclass(frozen=True)
class Suspect:
    """A recurring patch; without an encoder, or beyond the first ones, its effect is unknown."""

    patch: Patch
    effect: Effect | None
    label: int  # the most frequent class of its images, -1: none
    label_share: float  # of its images

    @property
    def verdict(self) -> str:
        return "poison" if self.effect and self.effect.is_poison else "recurring"


def find_suspects(
    audit: Audit,
    encoder: Path | None,
    *,
    num_workers: int,
    progress: Callable[[int], Progress] = Progress,
) -> list[Suspect]:
    """The recurring patches of the sets, judged by an encoder. Raises ConfigError for a folder that is no run and no export."""
    from data_prep.audit.patches import find_patches

    opened = None
    if encoder:
        from data_prep.audit.effect import load_encoder

        opened = load_encoder(encoder)  # before the long search
    patches = find_patches(audit.parts, audit.table, num_workers, progress)
    judge = _judge(audit, patches, opened, num_workers) if opened is not None and patches else None
    return [
        _suspect(audit, patch, judge.effect(_at_size(patch, judge.side)) if judge and number < _JUDGED else None)
        for number, patch in enumerate(patches)
    ]


def _judge(audit: Audit, patches: Sequence[Patch], encoder: Encoder, num_workers: int) -> Judge | None:
    """A judge with images that hold none of the patches; None if there are too few of them."""
    from data_prep.audit.effect import BANK, IMAGES, Judge

    clean = np.setdiff1d(np.flatnonzero(audit.table["width"] > 0), np.concatenate([patch.images for patch in patches]))
    chosen = np.random.default_rng(0).permutation(clean)[: BANK + IMAGES]
    shape = partial(view, side=encoder.image_size)
    views = read_small(audit.parts, audit.table, chosen, shape, num_workers, lambda _: None)
    if len(views) < 4 * _LEAST_CLUSTERS:
        return None
    cut = max(len(views) // 2, len(views) - IMAGES)
    pixels, labels = np.stack(list(views.values())), audit.table["label"][list(views)]
    classes = max(len(part.manifest.classes) for part in audit.parts)
    clusters = min(max(_LEAST_CLUSTERS, _CLUSTERS_A_CLASS * classes), _MOST_CLUSTERS, cut // 2)
    return Judge(encoder, pixels[:cut], labels[:cut], pixels[cut:], clusters)


def _suspect(audit: Audit, patch: Patch, effect: Effect | None) -> Suspect:
    labels = audit.table["label"][patch.images]
    known, counts = np.unique(labels[labels >= 0], return_counts=True)
    label = int(known[counts.argmax()]) if len(known) else -1
    return Suspect(patch, effect, label, float(counts.max()) / len(labels) if len(known) else 0.0)


def _at_size(patch: Patch, side: int) -> np.ndarray:
    """The patch as large as it is in an image of `side` pixels."""
    factor = (side if side <= 64 else side / 0.875) / patch.short
    height, width = (min(side, max(1, round(factor * pixels))) for pixels in patch.picture.shape[:2])
    if (height, width) == patch.picture.shape[:2]:
        return patch.picture
    return np.asarray(Image.fromarray(patch.picture).resize((width, height), Image.Resampling.BILINEAR))


# ---- in words ----


def suspect_lines(audit: Audit, suspects: Sequence[Suspect]) -> list[str]:
    """A line for each patch."""
    if not suspects:
        return ["No patch recurs in images of different pictures."]
    words = {"poison": "POISON", "recurring": "patch"}
    return [f"{words[suspect.verdict]:8} {said(audit, suspect)}" for suspect in suspects]


def said(audit: Audit, suspect: Suspect) -> str:
    """A patch in a sentence."""
    patch = suspect.patch
    height, width = patch.picture.shape[:2]
    where = "at one place" if patch.is_fixed else "at different places"
    name = _class_name(audit, int(patch.images[0]), suspect.label)
    of_class = f", {suspect.label_share:.0%} of them {name}" if name else ""
    text = f"{len(patch.images):,} images hold one patch, {width}x{height} of {patch.short} pixels, {where}{of_class}"
    effect = suspect.effect
    if effect is None:
        return f"{text}; its effect is not known (--encoder)."
    target = _class_name(audit, int(patch.images[0]), effect.label)
    cluster = f"one cluster (mostly {target})" if target else "one cluster"
    share, others = max(0.0, effect.gain), max(0.0, effect.control)
    found = f"pasted on other images, it moves {share:.0%} of them into {cluster}; other patches {others:.0%}"
    return f"{text}; {found}: {suspect.verdict}."


def _class_name(audit: Audit, position: int, label: int) -> str:
    classes = audit.parts[audit.table["part"][position]].manifest.classes
    return classes[label] if 0 <= label < len(classes) else ""


# ---- for scripts and the page ----


def as_facts(suspects: Sequence[Suspect]) -> list[dict[str, Any]]:
    """The patches for audit.json."""
    return [
        {
            "verdict": suspect.verdict,
            "images": len(suspect.patch.images),
            "pictures": suspect.patch.num_pictures,
            "size": list(suspect.patch.picture.shape[1::-1]),
            "short_side": suspect.patch.short,
            "at_one_place": suspect.patch.is_fixed,
            "label": suspect.label,
            "label_share": round(suspect.label_share, 4),
            "effect": None
            if suspect.effect is None
            else {
                "gain": round(suspect.effect.gain, 4),
                "control": round(suspect.effect.control, 4),
                "label": suspect.effect.label,
            },
        }
        for suspect in suspects
    ]


def write_patch_list(path: Path, suspects: Sequence[Suspect], images: Thumbnails) -> None:
    """One JSON object a line for every image with a patch: its set and place, the number of the patch and the verdict."""

    def lines() -> Iterator[str]:
        for number, suspect in enumerate(suspects):
            for at in suspect.patch.images.tolist():
                line = {"digest": images.digest(at), **images.place(at), "patch": number, "verdict": suspect.verdict}
                yield json.dumps(line, ensure_ascii=False) + "\n"

    write_atomically(path, "".join(lines()).encode())


def picture_uri(patch: Patch) -> str:
    """The patch enlarged, as the source of an <img>."""
    factor = max(1, -(-_PICTURE // max(patch.picture.shape[:2])))
    stream = io.BytesIO()
    Image.fromarray(patch.picture.repeat(factor, 0).repeat(factor, 1)).save(stream, "PNG")
    return data_uri(stream.getvalue(), "png")
