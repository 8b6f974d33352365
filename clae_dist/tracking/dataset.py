"""The training images of a run for a tracking page: name, digest, location and counts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from clae_dist.config import Config
from clae_dist.config.sharing import shareable
from clae_dist.data.manifest import Manifest
from clae_dist.data.urls import expand, scheme, without_secrets

MAX_DIGEST = 36  # characters that MLflow keeps


@dataclass(frozen=True)
class TrackedSet:
    """Description of a set of images. `source` is a JSON object without credentials or commands."""

    name: str
    digest: str
    source_type: str  # local, https, s3, pipe, …
    source: str
    profile: str

    @staticmethod
    def of(manifest: Manifest, config: Config) -> TrackedSet:
        data = shareable(config).data
        kind = scheme(expand(data.shards)[0]) or "local"
        place = "url" if kind in ("http", "https") else "uri"
        where: dict[str, Any] = {place: without_secrets(data.shards)}
        if data.mixture:
            where["mixture"] = dict(data.mixture)
        profile = {
            "images": {split: manifest.num_samples(split) for split in manifest.splits},
            "classes": len(manifest.classes),
            "shards": sum(len(shards) for shards in manifest.splits.values()),
            "licence": manifest.licence,
            "origin": manifest.source,
            "manifest_digest": manifest.digest,
        }
        return TrackedSet(
            manifest.name[:500], manifest.digest[:MAX_DIGEST], kind, json.dumps(where)[:65_000], json.dumps(profile)
        )
