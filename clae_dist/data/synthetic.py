"""A small set of shards with images of noise, for dry runs without real images."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from clae_dist.data.manifest import Manifest, Shard, write_manifest
from clae_dist.files import file_sha256

_CLASSES = ("one", "two")


def write_synthetic_set(folder: Path, num_images: int, image_size: int, num_shards: int = 1) -> Manifest:
    """Write `num_images` noise JPEGs of image_size pixels to each of the splits train and test; always the same bytes."""
    folder.mkdir(parents=True)
    splits = {}
    for number, split in enumerate(("train", "test")):
        rng = np.random.default_rng(number)
        parts = np.array_split(np.arange(num_images), num_shards)
        splits[split] = tuple(_write_shard(folder, f"{split}-{i:06d}", part, image_size, rng) for i, part in enumerate(parts))
    return write_manifest(
        folder,
        name="noise",
        source="made by clae-dist",
        licence="none needed",
        classes=_CLASSES,
        splits=splits,
        quarantined=0,
        preparation={"image_size": image_size},
    )


def _write_shard(folder: Path, stem: str, ids: np.ndarray, image_size: int, rng: np.random.Generator) -> Shard:
    path = folder / f"{stem}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in ids.tolist():
            data = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)).save(data, "JPEG")
            for extension, content in ((".jpg", data.getvalue()), (".cls", b"%d" % (sample % len(_CLASSES)))):
                info = tarfile.TarInfo(f"{sample:06d}{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with tarfile.open(path) as tar:
        places = [(m.offset_data, m.size) for m in tar if m.name.endswith(".jpg")]
    index = np.array([(*place, sample % len(_CLASSES)) for place, sample in zip(places, ids.tolist(), strict=True)], np.int64)
    np.save(folder / f"{stem}.index.npy", index)
    return Shard(path.name, len(ids), path.stat().st_size, file_sha256(path), file_sha256(folder / f"{stem}.index.npy"))
