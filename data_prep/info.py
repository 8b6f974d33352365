"""Print the content of a manifest, for people and for scripts."""

from __future__ import annotations

from typing import Any

from clae_dist.data.manifest import Manifest

_CLASSES_SHOWN = 10
_LABELS = {"class_counts": "balance"}


def facts(manifest: Manifest) -> dict[str, Any]:
    """The set's name, origin, images by split and class, images set aside, preparation and digest, as JSON holds them."""
    return {
        "name": manifest.name,
        "source": manifest.source,
        "licence": manifest.licence,
        "created": manifest.created,
        "splits": {split: manifest.num_samples(split) for split in manifest.splits},
        "classes": list(manifest.classes),
        "class_counts": {split: list(counts) for split, counts in manifest.class_counts.items()},
        "quarantined": manifest.quarantined,
        "pixels": manifest.preparation.get("pixels", "not recorded"),
        "version": manifest.version or "not recorded",
        "digest": manifest.digest,
        **({"cleaned": steps} if (steps := manifest.preparation.get("quarantine")) else {}),
    }


def describe(manifest: Manifest) -> list[str]:
    """The facts, one line each; of many classes the first."""
    known = facts(manifest)
    shown = ", ".join(manifest.classes[:_CLASSES_SHOWN]) + (", …" if len(manifest.classes) > _CLASSES_SHOWN else "")
    known["splits"] = ", ".join(
        f"{split} {count} images in {len(manifest.splits[split])} shard(s)" for split, count in known["splits"].items()
    )
    known["classes"] = f"{len(manifest.classes)} ({shown})" if manifest.classes else "none: the images have no labels"
    known["class_counts"] = ", ".join(_balance(manifest, split) for split in known["class_counts"]) or "not recorded"
    known["quarantined"] = f"{manifest.quarantined} images"
    if "cleaned" in known:
        known["cleaned"] = "; ".join(map(_cleaning, known["cleaned"]))
    return [f"{_LABELS.get(key, key) + ':':<13}{value}" for key, value in known.items()]


def _cleaning(step: dict[str, Any]) -> str:
    """One use of `quarantine`."""
    lists = " and ".join(f"list {sha256[:12]}" for sha256 in step["lists"])
    return f"{step['dropped']} images dropped and {step['unlabelled']} labels removed from {step['of'][:12]}, by {lists}"


def _balance(manifest: Manifest, split: str) -> str:
    """The smallest and the largest class of a split, and what has no label."""
    counts = manifest.class_counts[split]
    unlabelled = manifest.num_samples(split) - sum(counts)
    parts = []
    if counts:
        few, many = min(counts), max(counts)
        smallest, largest = (manifest.classes[counts.index(count)] for count in (few, many))
        parts.append(f"{few} ({smallest}) to {many} ({largest}) a class" if few < many else f"{few} a class")
    if unlabelled:
        parts.append(f"{unlabelled} without a label")
    return f"{split} {' and '.join(parts)}"
