"""Small pictures of embedded images, for pages."""

from __future__ import annotations

import io
from typing import Any

from clae_dist.data.images import Images, open_dataset
from clae_dist.deploy.window import Window
from clae_dist.errors import ConfigError, DataError
from clae_dist.page import data_uri

_SIDE = 160  # pixels


def open_images(source: str, split: str, window: Window) -> Images:
    """The images that a file of embeddings was made of. Raises ConfigError for others, DataError for shards that are gone."""
    images = open_dataset(source, split)
    known = set(images.ids)
    strange = next((one for one in window.ids if one not in known), None)
    if strange is not None:
        raise ConfigError(f"--images {source!r} has no image {strange!r} of {window.name}; give those it was made of.")
    return images


def thumbnail(images: Images, identifier: Any) -> str:
    """The image of this id as a JPEG in a data URI; "" if it can no longer be decoded."""
    try:
        image = images[images.ids.index(identifier)][0].convert("RGB")
    except (DataError, OSError):
        return ""
    image.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return data_uri(stream.getvalue(), "jpeg")
