"""Batches of embeddings that ranks share and a kill does not lose, in a folder of parts beside the file.

# b images of a batch, F width of the features
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clae_dist import escape
from clae_dist.data.images import FileImages, Images, ShardImages
from clae_dist.deploy.embedding import LOOKS, EmbeddedBatch, embedded
from clae_dist.deploy.encoder import Encoder
from clae_dist.evaluation.journal import Journal, Tensors
from clae_dist.progress import Progress
from clae_dist.world import World

FORMAT = 1  # of the parts; those of another one are not continued
_FIELDS = ("features", "positions", "labels")


def embed_in_parts(
    images: Images,
    encoder: Encoder,
    target: Path,
    facts: Mapping[str, Any],
    batch_size: int,
    num_workers: int,
    world: World,
    say: Callable[[str], None] | None,
) -> Journal:
    """The embeddings of all batches, in the journal that this returns: `batch_of` reads one. Collective.

    Each rank embeds its share of the batches that are not there yet. The numbers of a batch do not depend on the rank. The
    journal's folder is named after encoder, images and batch size: others are not mixed.
    """
    folder: Path = world.run_on_main(lambda: _folder(images, encoder, target, facts, batch_size))
    finished: frozenset[int] = world.run_on_main(lambda: Journal(folder).finished)
    missing = [number for number in range(-(-len(images) // batch_size)) if number not in finished]
    mine = missing[world.rank :: world.size]
    done = len(images) - _count(missing, len(images), batch_size)
    line = say if world.is_main else _silent
    if done and world.is_main:
        (say or escape.say)(f"{done:,} of {len(images):,} images were embedded before an interruption, and are kept")
    progress = Progress(len(images), done=done, label="embedding: ", say=line)
    positions = [at for number in mine for at in _rows(number, len(images), batch_size)]
    journal = Journal(folder)
    try:
        for number, batch in zip(mine, embedded(images, encoder, batch_size, num_workers, positions), strict=True):
            journal.add(number, _tensors(batch))
            more = min(world.size * batch_size, len(images) - done)
            done += more
            progress.add(more)
    finally:
        journal.close()
    world.gather_objects(None)  # every rank has written its share
    progress.close()
    return Journal(folder) if world.is_main else journal


def batches_of(journal: Journal) -> Iterator[EmbeddedBatch]:
    """The batches in the order of the images."""
    for _, tensors in journal:
        features, positions, labels = (tensors[name].numpy() for name in _FIELDS)
        bad = json.loads(bytes(tensors["bad"].tolist()))
        looks = {name: tensors[name].numpy() for name in LOOKS}
        yield EmbeddedBatch(features, looks, positions, labels, {int(position): reason for position, reason in bad.items()})


def _tensors(batch: EmbeddedBatch) -> Tensors:
    arrays = {**{name: getattr(batch, name) for name in _FIELDS}, **batch.looks}
    arrays["bad"] = np.frombuffer(json.dumps(batch.bad).encode(), np.uint8)
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def _rows(number: int, total: int, batch_size: int) -> range:
    return range(number * batch_size, min(total, (number + 1) * batch_size))


def _count(numbers: list[int], total: int, batch_size: int) -> int:
    return sum(len(_rows(number, total, batch_size)) for number in numbers)


def _folder(images: Images, encoder: Encoder, target: Path, facts: Mapping[str, Any], batch_size: int) -> Path:
    key = {
        **facts,
        "parts": FORMAT,
        "image_size": encoder.image_size,
        "pixels": [encoder.mean.flatten().tolist(), encoder.std.flatten().tolist()],
        "device": encoder.mean.device.type,
        "batch_size": batch_size,
        "images": _digest(images),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return target.with_name(f".{target.name}.parts-{name}")


def _digest(images: Images) -> str:
    """Of the list of images: of shards their manifest's; of files their paths, sizes and times of change."""
    if isinstance(images, ShardImages):
        return f"{images.manifest.digest} {images.split}"
    assert isinstance(images, FileImages)
    digest = hashlib.sha256()
    for path, found in images.stats():
        digest.update(json.dumps([path, found.st_size, found.st_mtime_ns]).encode())
    return digest.hexdigest()


def _silent(_: str) -> None: ...
