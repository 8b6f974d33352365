"""Comparison of shards with their manifest."""

from __future__ import annotations

import mmap
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from clae_dist.data.manifest import FILE_NAME, Manifest, Shard, check_shard, load_manifest
from clae_dist.errors import DataError
from clae_dist.progress import Progress


def verify(folder: Path, num_threads: int = 2) -> list[str]:
    """The differences between a set and its manifest, one line each. Raises DataError if there is no manifest."""
    if not (folder / FILE_NAME).is_file():
        load_manifest(folder)  # raises and names what is missing
    try:
        manifest = load_manifest(folder)
    except DataError as error:
        return [str(error)]
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    differences, progress = list[str](), Progress(sum(shard.bytes for shard in shards), name="MB", scale=1e6)
    with ThreadPoolExecutor(num_threads) as threads:  # hashing releases the interpreter's lock
        for shard, lines in zip(shards, threads.map(lambda shard: _verify_shard(manifest, shard), shards), strict=True):
            differences += lines
            progress.add(shard.bytes)
    progress.close(only_if_printed=True)
    if "indexed" in manifest.preparation:  # the folder of indexed shards may hold other files
        return differences
    expected = {name for shard in shards for name in (shard.name, shard.index_name)}
    for path in sorted([*folder.glob("*.tar"), *folder.glob("*.index.npy")]):
        if path.name not in expected:
            differences.append(f"{path} is not in the manifest; remove it.")
    return differences


def _verify_shard(manifest: Manifest, shard: Shard) -> list[str]:
    try:
        check_shard(manifest.folder, shard)
        index = manifest.index(shard)
    except DataError as error:
        return [str(error)]
    return _verify_index(manifest, shard, index)


def _verify_index(manifest: Manifest, shard: Shard, index: np.ndarray) -> list[str]:
    """Rows of the index that do not point at a member of the tar, judged by the header in front of the bytes."""
    path = manifest.folder / shard.name
    offsets, sizes, _ = index.T
    differences = []
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for row, (offset, size) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True)):
            if not _is_header(content[offset - 512 : offset], size):
                differences.append(f"{path}: row {row} of the index points at no member of {size} bytes.")
                break
    if len(np.unique(offsets)) != shard.samples:
        differences.append(f"{path}: {shard.samples - len(np.unique(offsets))} samples of the index point at the same bytes.")
    return differences


def _is_header(block: bytes, size: int) -> bool:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size == size
    except tarfile.HeaderError:
        return False
