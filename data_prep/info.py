"""What a manifest says about its set, for people and for scripts."""

from __future__ import annotations

from typing import Any

from clae_dist.data.manifest import Manifest

_CLASSES_SHOWN = 10


def facts(manifest: Manifest) -> dict[str, Any]:
    """The set's name, origin, images by split, classes, images set aside and digest, as JSON holds them."""
    return {
        "name": manifest.name,
        "source": manifest.source,
        "licence": manifest.licence,
        "created": manifest.created,
        "splits": {split: manifest.num_samples(split) for split in manifest.splits},
        "classes": list(manifest.classes),
        "quarantined": manifest.quarantined,
        "digest": manifest.digest,
    }


def describe(manifest: Manifest) -> list[str]:
    """The facts, one line each; of many classes the first."""
    known = facts(manifest)
    shown = ", ".join(manifest.classes[:_CLASSES_SHOWN]) + (", …" if len(manifest.classes) > _CLASSES_SHOWN else "")
    known["splits"] = ", ".join(
        f"{split} {count} images in {len(manifest.splits[split])} shard(s)" for split, count in known["splits"].items()
    )
    known["classes"] = f"{len(manifest.classes)} ({shown})" if manifest.classes else "none: the images have no labels"
    known["quarantined"] = f"{manifest.quarantined} images"
    return [f"{key + ':':<13}{value}" for key, value in known.items()]
