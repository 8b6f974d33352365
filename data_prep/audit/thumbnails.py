"""Single images of an audit: where each lies, what it is called, and how it looks, small."""

from __future__ import annotations

import io
import mmap
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from clae_dist.data.tar_index import stored_name
from data_prep.audit.find import Audit
from data_prep.audit.scan import open_shard

_SIDE = 160  # pixels of a thumbnail's long side
_OPEN_SHARDS = 64


class Thumbnails:
    """The images of an audit by their position in its table. Opens shards when they are asked for."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._open = lru_cache(_OPEN_SHARDS)(self._map)

    def _map(self, part: int, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        manifest, record = self._audit.parts[part].manifest, self._audit.parts[part].shards[shard]
        return open_shard(manifest.folder, record), manifest.index(record)

    def place(self, at: int) -> dict[str, Any]:
        """Set, split, shard, row, name in the tar, class and label."""
        entry = self._audit.table[at]
        part = self._audit.parts[entry["part"]]
        label = int(entry["label"])
        return {
            "set": part.set_name,
            "split": part.split,
            "shard": part.shards[entry["shard"]].name,
            "row": int(entry["row"]),
            "name": self._name(at),
            "class": part.manifest.classes[label] if 0 <= label < len(part.manifest.classes) else None,
            "label": label,
        }

    def digest(self, at: int) -> str:
        """The digest of the set that the image is in."""
        return self._audit.parts[self._audit.table[at]["part"]].manifest.digest

    def _name(self, at: int) -> str:
        entry = self._audit.table[at]
        mapped, index = self._open(int(entry["part"]), int(entry["shard"]))
        return stored_name(mapped, int(index[entry["row"], 0]))

    def thumbnail(self, at: int) -> bytes:
        """The image as a small JPEG."""
        from clae_dist.data.decode import decode_rgb

        entry = self._audit.table[at]
        mapped, index = self._open(int(entry["part"]), int(entry["shard"]))
        offset, size = index[entry["row"], :2].tolist()
        image = Image.fromarray(decode_rgb(mapped[offset : offset + size]).permute(1, 2, 0).contiguous().numpy())
        if max(image.size) > _SIDE:
            image.thumbnail((_SIDE, _SIDE))
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=85)
        return stream.getvalue()
