"""Prefetch remote shards: the order is a function, so the shards of the next steps are known."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from clae_dist.config import Config
from clae_dist.data.fetch import Stopped
from clae_dist.data.manifest import Manifest
from clae_dist.data.mixture import MixedOrder
from clae_dist.data.order import Order
from clae_dist.data.remote import Fetching
from clae_dist.errors import DataError
from clae_dist.world import World

Item = TypeVar("Item")
_CONNECTIONS = 4
_JOIN_S = 5.0  # a fetch that stalls may outlast it; its thread ends with the process


class Prefetch:
    """Threads that call fetch(shard) for `needs`, at most `ahead` shards before the step that needs them.

    `needs` yields (step, shard) in the order of steps. Failures are ignored here: the reader of the shard fetches it again and
    reports them.
    """

    def __init__(
        self, needs: Iterator[tuple[int, int]], fetch: Callable[[int, threading.Event], None], ahead: int, first_step: int
    ) -> None:
        self._needs, self._fetch, self._ahead = needs, fetch, ahead
        self._step = first_step
        self._waiting: list[int] = []  # steps, still to come, of the shards that were fetched
        self._stop = threading.Event()
        self._moved = threading.Condition()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(min(_CONNECTIONS, ahead))]
        for thread in self._threads:
            thread.start()

    def follow(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Yield the same batches; each advances the threads by a step. The threads end with the batches."""
        try:
            for batch in batches:
                with self._moved:
                    self._step += 1
                    self._moved.notify_all()
                yield batch
        finally:
            self.close()

    def close(self) -> None:
        self._stop.set()
        with self._moved:
            self._moved.notify_all()
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _next(self) -> int | None:
        """The next shard to fetch, once it may be; None at the end."""
        with self._moved:
            while not self._stop.is_set():
                self._waiting = [step for step in self._waiting if step > self._step]
                if len(self._waiting) < self._ahead:
                    need = next(self._needs, None)
                    if need is None:
                        return None
                    self._waiting.append(need[0])
                    return need[1]
                self._moved.wait()
            return None

    def _run(self) -> None:
        while (shard := self._next()) is not None:
            try:
                self._fetch(shard, self._stop)
            except DataError:
                continue  # the loader process that needs the shard tries for itself, and its failure ends the run
            except Stopped:
                return


def ahead_of(
    batches: Iterator[Item], manifest: Manifest, order: Order | MixedOrder, config: Config, world: World, steps: range
) -> Iterator[Item]:
    """`batches` of `steps`, with this rank's remote shards fetched ahead of need."""
    files = manifest.files
    shards = manifest.shards(config.data.train_split)
    depth = _depth(config, manifest, world)
    if files is None or not files.any_remote or not depth:
        return batches

    def fetch(shard: int, stop: threading.Event) -> None:
        files.open_index(shards[shard]).close()
        files.open(shards[shard], stop).close()

    return Prefetch(order.shards_needed(steps, world.rank, world.size), fetch, depth, steps.start).follow(batches)


def _depth(config: Config, manifest: Manifest, world: World) -> int:
    """Number of shards a rank may fetch ahead: as requested, limited by the cache's space beside the shards in use."""
    limit = config.data.cache_bytes
    if not limit:
        return config.data.prefetch_shards
    in_use, largest = working_set(config, manifest, world)
    return max(0, min(config.data.prefetch_shards, (limit - in_use) // (largest * world.local_size)))


def working_set(config: Config, manifest: Manifest, world: World) -> tuple[int, int]:
    """Bytes of the shards that this machine's ranks read at a time, and of the largest shard."""
    shards = manifest.shards(config.data.train_split)
    largest = max(shard.bytes for shard in shards)
    # All ranks read a mixture's sets from the same places.
    streams = 1 + len(config.data.mixture) if config.data.mixture else -(-config.num_streams * world.local_size // world.size)
    return min(len(shards), streams * config.data.shuffle_shards) * largest, largest


def advice(config: Config, manifest: Manifest, world: World) -> Iterator[str]:
    """Advice if the cache is smaller than the shards that are read at a time, else ""."""
    in_use, largest = working_set(config, manifest, world)
    limit, cache = config.data.cache_bytes, Fetching.of(config.data).cache
    has = cache.room.size()
    if in_use > has:
        holds = (
            f"data.cache_bytes {has / 1e9:.3g} GB holds"
            if limit
            else f"the disk of {cache.folder} has for it ({has / 1e9:.3g} GB)"
        )
        way_out = f"data.cache_bytes={in_use + largest}" if limit else "a data.cache on a larger disk"
        yield (
            f"data: up to {in_use // largest} shards are read from at a time (data.streams {config.num_streams} x "
            f"data.shuffle_shards {config.data.shuffle_shards}), {in_use / 1e9:.3g} GB, more than {holds}: shards will be "
            f"fetched again and again. Try {way_out}{'' if config.data.mixture else ', or fewer streams'}."
        )
