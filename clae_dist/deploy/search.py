"""`clae search`: the embedded images that are nearest to an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clae_dist.data.images import open_dataset
from clae_dist.deploy.embedding import embed
from clae_dist.deploy.encoder import Encoder
from clae_dist.deploy.thumbnails import open_images, thumbnail
from clae_dist.deploy.window import Window
from clae_dist.errors import ConfigError, DataError
from clae_dist.evaluation.knn import nearest
from clae_dist.page import render


@dataclass(frozen=True)
class Hit:
    """An image of the index and the cosine of its features to the query's."""

    id: Any
    cosine: float


def search(index: Window, encoder: Encoder, queries: list[Path], k: int) -> list[list[Hit]]:
    """The k nearest images of the index for each query, the nearest first.

    Raises ConfigError if the index is of another encoder, DataError for an image that cannot be decoded.
    """
    if index.facts.get("weights") != encoder.weights_digest():
        raise ConfigError(f"{index.name!r} was embedded by another encoder than --encoder; embed the images with this one.")
    missing = [str(path) for path in queries if not path.is_file()]
    if missing:
        raise DataError(f"IMAGE is {missing[0]!r}, which is no file; name an image (JPEG, PNG, WebP, …).")
    features = torch.from_numpy(embed([str(path) for path in queries], encoder, num_workers=0, on_undecodable="nan"))
    bad = [str(path) for path, row in zip(queries, features, strict=True) if row.isnan().any()]
    if bad:
        raise DataError(f"{', '.join(bad)} cannot be decoded; give images (JPEG, PNG, WebP, …).")
    found = nearest(features, index.features, k)
    return [
        [Hit(index.ids[row], cosine) for row, cosine in zip(rows, cosines, strict=True)]
        for rows, cosines in zip(found.rows.tolist(), found.cosines.tolist(), strict=True)
    ]


def page(index: Window, queries: list[Path], hits: list[list[Hit]], source: str | None, split: str) -> str:
    """HTML with each query and its neighbours; with pictures of them if `source` has the images of the index."""
    images = open_images(source, split, index) if source else None
    asked = open_dataset([str(path) for path in queries])
    rows = [
        {
            "query": str(path),
            "picture": thumbnail(asked, asked.ids[number]),
            "hits": [
                {"id": str(hit.id), "cosine": hit.cosine, "picture": thumbnail(images, hit.id) if images else ""}
                for hit in found
            ],
        }
        for number, (path, found) in enumerate(zip(queries, hits, strict=True))
    ]
    return render("clae_dist", "search.html", title="Nearest images", index=index.name, rows=rows)
