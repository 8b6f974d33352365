"""Remote shards: fetched when needed, checked against the manifest, kept in the cache."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from clae_dist.config import Data
from clae_dist.data.cache import Cache
from clae_dist.data.fetch import Patience, digest_check, fetch
from clae_dist.data.manifest import FILE_NAME, Manifest, Shard, read_manifest
from clae_dist.data.urls import join, redact
from clae_dist.errors import DataError
from clae_dist.staging import cache_home

MAX_OPEN = 512
FOLDER = "shards"  # in data.cache
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Fetching:
    """The settings of fetching and caching, a part of `data.*` that can be sent to other processes."""

    folder: str  # "": the cache folder of the current user
    limit_bytes: int
    patience: Patience

    @staticmethod
    def of(data: Data) -> Fetching:
        return Fetching(data.cache, data.cache_bytes, Patience(data.retries, data.timeout_s))

    @property
    def cache(self) -> Cache:
        """The cache, in a folder of its own, because it deletes files."""
        return Cache((Path(self.folder) if self.folder else cache_home()) / FOLDER, self.limit_bytes)

    def max_open(self, shard_bytes: Sequence[int], processes: int) -> int:
        """A mapped shard occupies disk space even after the cache has removed it. If the cache cannot hold all shards, mapped
        ones may take half as much again."""
        has = self.cache.room.size()
        if sum(shard_bytes) <= has:
            return MAX_OPEN
        return max(2, min(MAX_OPEN, has // (2 * processes * max(shard_bytes))))

    def describe(self) -> str:
        limit = f"at most {self.limit_bytes / 1e9:.3g} GB" if self.limit_bytes else "as much as the disk has"
        return f"cache {self.cache.folder} ({limit})"


@dataclass(frozen=True)
class RemoteFolder:
    """The files of a set whose manifest is at `url`/manifest.json. The cache names files by their SHA-256."""

    url: str = field(repr=False)
    fetching: Fetching
    any_remote: bool = True

    @property
    def where(self) -> str:
        return redact(self.url)

    def max_open(self, shard_bytes: Sequence[int], processes: int) -> int:
        return self.fetching.max_open(shard_bytes, processes)

    def open(self, shard: Shard, stop: threading.Event | None = None) -> IO[bytes]:
        check = digest_check(shard.bytes, shard.sha256)

        def fill(part: IO[bytes]) -> None:
            fetch(join(self.url, shard.name), part, shard.name, self.fetching.patience, check, shard.bytes, stop)

        return self.fetching.cache.open(f"{shard.sha256}.tar", shard.bytes, fill)

    def open_index(self, shard: Shard) -> IO[bytes]:
        name = shard.index_name

        def fill(part: IO[bytes]) -> None:
            fetch(join(self.url, name), part, name, self.fetching.patience, digest_check(0, shard.index_sha256))

        return self.fetching.cache.open(f"{shard.index_sha256}.npy", 0, fill)

    def describe(self) -> str:
        return f"{self.fetching.describe()}; every shard is checked (sha256) when it is fetched"


def load_remote_manifest(url: str, data: Data) -> Manifest:
    """Fetch the manifest at a URL. Raises DataError if it cannot be fetched or is no manifest."""
    fetching, where = Fetching.of(data), redact(url)

    def read(file: IO[bytes]) -> Manifest:
        file.seek(0)
        return read_manifest(file.read(), f"{where}/{FILE_NAME}", fetching.cache.folder)

    def check(file: IO[bytes]) -> str:
        try:
            read(file)
        except DataError as error:
            return str(error)
        return ""

    with tempfile.TemporaryFile() as file:
        fetch(join(url, FILE_NAME), file, FILE_NAME, fetching.patience, check)
        manifest = read(file)
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    for shard in shards:  # they become file names in the cache
        if not (_SHA256.fullmatch(shard.sha256) and _SHA256.fullmatch(shard.index_sha256)):
            raise DataError(
                f"{where}/{FILE_NAME} gives {shard.name} the sha256 {shard.sha256!r} and its index {shard.index_sha256!r}, "
                "which are not SHA-256 digests; prepare the set again."
            )
    return replace(manifest, files=RemoteFolder(url, fetching))
