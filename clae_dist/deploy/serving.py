"""An export that answers requests: images in, features and, with a head, classes out.

Requests come from strangers. Images are bounded in bytes, pixels and number before they are decoded; a path is opened only
below one folder that the operator names, and no link leads out of it.

# n images of a request, S pixels a side, F width of the features, C classes
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clae_dist.data.decode import DecodeError, decode_rgb, stored_size
from clae_dist.data.views import centre_view
from clae_dist.deploy.encoder import load_encoder
from clae_dist.deploy.head import read_head
from clae_dist.deploy.layout import HEAD
from clae_dist.errors import DataError
from clae_dist.evaluation.features import frozen
from clae_dist.reading import ReadError, read_bytes

IMAGE, PATH = "image", "path"  # columns of a request
MAX_IMAGES = 256  # of a request
MAX_BYTES = 32 << 20  # of an image
MAX_PIXELS = 50_000_000  # of an image


class Service:
    """The encoder of an export, with its head where there is one. `images` is the folder of paths; "": none are allowed."""

    def __init__(self, export: Path, images: str = "") -> None:
        """Raises ConfigError for a folder that is no export."""
        self._encoder = load_encoder(export)
        path = export / HEAD
        self._head = read_head(path, self._encoder) if path.exists() else None
        self._folder = os.path.realpath(images) if images else ""

    def answer(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A record for each row {"image": bytes} or {"path": text}: `embedding`, and with a head `class` and `probability`.

        Raises DataError with a message that is safe to send back to the client.
        """
        if not 0 < len(rows) <= MAX_IMAGES:
            raise DataError(f"the request has {len(rows)} images; send 1 to {MAX_IMAGES}, in a column image or path.")
        views = torch.stack([self._view(number, row) for number, row in enumerate(rows)])
        with frozen(self._encoder):
            features_nF = self._encoder(views.float() / 255)
            answers: list[dict[str, Any]] = [{"embedding": row} for row in features_nF.tolist()]
            if self._head is not None:
                shares, places = self._head.linear.logits(features_nF).softmax(1).max(1)
                for answer, share, place in zip(answers, shares.tolist(), places.tolist(), strict=True):
                    answer |= {"class": self._head.classes[place], "probability": share}
        return answers

    def _view(self, number: int, row: Mapping[str, Any]) -> torch.Tensor:
        """uint8 (3, S, S): the image as evaluation sees it."""
        try:
            data = self._bytes(row)
            _check_size(*stored_size(data))
            return centre_view(decode_rgb(data), self._encoder.image_size)
        except (DecodeError, ReadError) as error:
            raise DataError(f"image {number} of the request cannot be used: {error}.") from None

    def _bytes(self, row: Mapping[str, Any]) -> bytes:
        """Raises ReadError."""
        given = {key: value for key in (IMAGE, PATH) if not _is_missing(value := row.get(key))}
        if len(given) != 1:
            raise ReadError(f"it has {' and '.join(given) or 'neither image nor path'}; give one of them")
        ((key, value),) = given.items()
        if key == PATH:
            return self._read(value)
        if not isinstance(value, bytes):
            raise ReadError(f"image is {type(value).__name__}; give the bytes of a JPEG, PNG or WebP file, in base64 in JSON")
        if len(value) > MAX_BYTES:
            raise ReadError(f"it has {len(value):,} bytes, more than {MAX_BYTES:,}")
        return value

    def _read(self, path: Any) -> bytes:
        """The bytes of a file below the folder of images. Files outside of it, and missing ones, get the same answer."""
        if not self._folder:
            raise ReadError("this server opens no paths (CLAE_SERVE_IMAGES is not set); send the bytes as image")
        if not isinstance(path, str):
            raise ReadError(f"path is {type(path).__name__}; give a text")
        try:
            real = os.path.realpath(os.path.join(self._folder, path))
            if os.path.commonpath([self._folder, real]) == self._folder and real != self._folder:
                return read_bytes(real, MAX_BYTES, follow=False)
        except (ReadError, ValueError, OSError):  # a null character, a missing file, a folder, a pipe
            real = ""
        raise ReadError(
            f"path {path[:200]!r} is no readable file of at most {MAX_BYTES:,} bytes in this server's folder of images"
        )


def _check_size(width: int, height: int) -> None:
    """Raise DecodeError for a large image."""
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width}x{height} pixels, more than {MAX_PIXELS:,}")


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
