"""Batches of one to three views: a map from a step to this rank's share of the global batch.

Because the order is a function, a loader process receives a step and returns its batch: the batches are the same with any
number of loader processes, and resuming means starting at another step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from types import FrameType
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from clae_dist.config import Config
from clae_dist.cores import loader_processes
from clae_dist.data import transport
from clae_dist.data.augment import AUGMENT_DRAWS
from clae_dist.data.decode import torchvision_decoder
from clae_dist.data.draws import uniforms
from clae_dist.data.manifest import Manifest
from clae_dist.data.mixture import MixedFiles, MixedOrder
from clae_dist.data.order import Order
from clae_dist.data.prefetch import ahead_of
from clae_dist.data.shards import ShardReader
from clae_dist.data.views import CROP_DRAWS, centre_view, crop_boxes, resized_crop, shifted_view
from clae_dist.errors import DataError
from clae_dist.lifetime import begin_forked_process, fork_server, fork_server_from_here, main_module_hidden
from clae_dist.world import World

Item = TypeVar("Item")
_FIRST_LOCAL = 3  # the number of the first small crop, for its draws: after the views that there may be
_DRAWS_A_VIEW = CROP_DRAWS + AUGMENT_DRAWS
_PRELOAD = "clae_dist.data.preload"
_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


@dataclass(frozen=True)
class LoadTime:
    """The time that a batch has taken. All are equal: a batch is a function of its step, its time is not."""

    reading_s: float = field(default=0.0, compare=False)  # on its bytes
    decoding_s: float = field(default=0.0, compare=False)  # on decoding and cropping


class LoadedBatch(NamedTuple):
    """This rank's B rows of a global batch, on the CPU. S is the side of a view."""

    views: torch.Tensor  # uint8 (V, B, 3, S, S), each interleaved in memory: cropped, not yet augmented; V = 1 to 3
    draws: torch.Tensor  # float32 (V, B, AUGMENT_DRAWS) in [0, 1), for the augmentation on the device
    ids: torch.Tensor  # int64 (B,): index of the sample in its split
    labels: torch.Tensor  # int64 (B,): -1 without label
    bad: dict[str, str]  # samples that could not be decoded, with reasons; another of their shard is in their place
    strength: float = 1.0  # of the augmentation (Augment.weakened)
    metadata: Sequence[dict[str, bytes]] = ()  # B, where data.metadata asks for files: those of each sample, by kind
    local: torch.Tensor | None = None  # uint8 (L, B, 3, s, s): the small crops of views.local_crops; L more rows of draws
    took: LoadTime = LoadTime()


class TrainingViews(Dataset[LoadedBatch]):
    """A map-style dataset: `self[step]` is one rank's share of the global batch of a step."""

    def __init__(self, reader: ShardReader, order: Order | MixedOrder, config: Config, rank: int, world_size: int) -> None:
        self._reader, self._order = reader, order
        self._config = config
        self._rank, self._world_size = rank, world_size

    def __getstate__(self) -> tuple[ShardReader, Config, int, int]:
        return self._reader, self._config, self._rank, self._world_size

    def __setstate__(self, state: tuple[ShardReader, Config, int, int]) -> None:
        reader, config, rank, world_size = state
        self.__init__(reader, make_order(config, reader), config, rank, world_size)  # type: ignore[misc]

    def __getitem__(self, step: int) -> LoadedBatch:
        start, read_before = time.perf_counter(), self._reader.reading_s
        places = self._order.batch(step, self._rank, self._world_size)
        size, rows = self._config.data.image_size, len(places.ids)
        strength = self._config.augment.strength(step // self._order.steps_per_epoch, self._config.train.epochs)
        augment = self._config.augment.weakened(strength)
        # One row of numbers per view and sample, on any rank: all world sizes train on the same pixels.
        seed, num_views = self._config.seed, num_views_of(self._config)
        num_local = self._config.views.local_crops
        numbers = (*range(num_views), *range(_FIRST_LOCAL, _FIRST_LOCAL + num_local))
        draws = np.stack([uniforms(_DRAWS_A_VIEW, seed, 2 + view, places.epochs, places.ids) for view in numbers])
        read = [self._reader.read_or_next(*place) for place in zip(places.shards.tolist(), places.rows.tolist(), strict=True)]
        images = [sample.image for sample in read]
        heights, widths = np.array([image.shape[1:] for image in images]).T
        views = torch.empty((num_views, rows, size, size, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
        for view in range(min(2, num_views)):
            if augment.crop == "shifted":
                for row, image in enumerate(images):
                    views[view, row] = shifted_view(image, draws[view, row, :2], size)
                continue
            boxes = crop_boxes(draws[view, :, :CROP_DRAWS], heights, widths, augment.crop_scale, augment.crop_ratio)
            for row, image in enumerate(images):
                views[view, row] = resized_crop(image, boxes[row], size)
        local = self._local_crops(images, draws[num_views:, :, :CROP_DRAWS], heights, widths) if num_local else None
        for row, image in enumerate(images if num_views == 3 else ()):
            weak = self._config.method.third_view == "weak"
            views[2, row] = shifted_view(image, draws[2, row, :2], size) if weak else centre_view(image, size)
        # float32 rounds one in 30 million to 1; a draw is below 1.
        augment_draws = torch.from_numpy(np.minimum(draws[:, :, CROP_DRAWS:].astype(np.float32), _BELOW_ONE))
        labels = torch.tensor([sample.label for sample in read])
        skipped = {name: reason for sample in read for name, reason in sample.bad.items()}
        metadata = [sample.metadata for sample in read] if self._config.data.metadata else []
        reading_s = self._reader.reading_s - read_before
        return LoadedBatch(
            views=views,
            draws=augment_draws,
            ids=torch.from_numpy(places.ids),
            labels=labels,
            bad=skipped,
            strength=strength,
            metadata=metadata,
            local=local,
            took=LoadTime(reading_s, time.perf_counter() - start - reading_s),
        )

    def _local_crops(
        self, images: Sequence[torch.Tensor], draws: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> torch.Tensor:
        settings, size = self._config.views, self._config.local_size
        local = torch.empty((len(draws), len(images), size, size, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
        for number, cuts in enumerate(draws):
            boxes = crop_boxes(cuts, heights, widths, settings.local_scale, self._config.augment.crop_ratio)
            for row, image in enumerate(images):
                local[number, row] = resized_crop(image, boxes[row], size)
        return local


def num_views_of(config: Config) -> int:
    """V, the views of an image that a step loads."""
    if config.method.one_view:
        return 1
    return 2 if config.method.third_view == "none" else 3


def make_order(config: Config, reader: ShardReader) -> Order | MixedOrder:
    """The order of the train split under this configuration, or of the sets of a mixture."""
    files = reader.manifest.files
    if isinstance(files, MixedFiles):
        sizes = [[shard.samples for shard in one.shards(reader.split)] for one in files.sets]
        return MixedOrder(sizes, files.shares, config.batch.global_size, config.data.shuffle_shards, config.seed)
    return Order(reader.sizes, config.batch.global_size, config.num_streams, config.data.shuffle_shards, config.seed)


def num_workers(config: Config, local_size: int) -> int:
    """Loader processes for each of `local_size` ranks on this machine: as requested, or a share of the free cores."""
    if config.data.workers >= 0:
        return config.data.workers
    return loader_processes(local_size)


def forkserver() -> BaseContext:
    """The context of the fork server, which has no threads of gloo or torch (forking those may deadlock)."""
    return fork_server(_PRELOAD)


def share_imports(config: Config, local_size: int) -> None:
    """Where a fork is safe, have loader processes share this rank's imports (about 300 MB). Call it before `world.connect`."""
    if num_workers(config, local_size):
        torchvision_decoder()  # imports torchvision, which rank and loaders both need
        fork_server_from_here(_PRELOAD)


def start_loader_process(worker: int = 0) -> None:
    """Prepare a child of the fork server: it leaves signals to the rank, and ends with the rank in whatever way that dies.

    A rank's death kills its server, whose death kills the child. Torch's own watch does not see it: a child's parent is the
    server, and the server lives as long as its children hold its pipe.
    """
    leave_signals_to_the_rank()
    transport.report_lost_batches()
    begin_forked_process()


def leave_signals_to_the_rank() -> None:
    """Ignore Ctrl-C and a scheduler's signals, which reach every process: the rank still needs batches to end its step.

    After SIGTERM, by which torch also ends its loaders, this process stays for half a minute.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)


def _end_soon(number: int, frame: FrameType | None) -> None:
    signal.alarm(30)


def load(manifest: Manifest, config: Config, world: World, first_step: int, last_step: int) -> Iterator[LoadedBatch]:
    """This rank's batches of the steps first_step … last_step - 1, in order."""
    workers = num_workers(config, world.local_size)
    reader = ShardReader(manifest, config.data.train_split, config.data.metadata, world.local_size * max(1, workers))
    order, steps = make_order(config, reader), range(first_step, last_step)
    views = TrainingViews(reader, order, config, world.rank, world.size)
    batches = read_ahead(views, steps, workers, shared_memory_bytes(config, world), pin_memory=world.device.type == "cuda")
    return ahead_of(batches, manifest, order, config, world, steps)


def read_ahead(
    items: Dataset[Item], indices: Sequence[int], num_workers: int, needed_bytes: int, *, pin_memory: bool = False
) -> Iterator[Item]:
    """`items[index]` for each of the indices in their order, read ahead by `num_workers` processes (0: by this one).

    They come through shared memory if it has `needed_bytes`, otherwise through pipes.
    """
    loader = DataLoader(
        items if transport.fits(needed_bytes) else transport.ThroughPipes(items),
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        prefetch_factor=transport.PREFETCH if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=start_loader_process,
        multiprocessing_context=forkserver() if num_workers else None,
    )
    with main_module_hidden():
        return _plain_errors(iter(loader))


def shared_memory_bytes(config: Config, world: World) -> int:
    """Bytes of shared memory that the batches of this machine's ranks need in transport."""
    rows, size = config.rows_per_rank(world.size), config.data.image_size
    views, local = num_views_of(config), config.views.local_crops
    pixels = 3 * (views * size**2 + local * config.local_size**2)
    batch_bytes = rows * (pixels + (views + local) * 4 * AUGMENT_DRAWS + 2 * 8)
    return transport.needed_bytes(batch_bytes, num_workers(config, world.local_size), world.local_size)


def _plain_errors(batches: Iterator[Item]) -> Iterator[Item]:
    """The error of a loader process, without the traceback that torch adds to its message."""
    try:
        yield from batches
    except DataError as error:
        raise DataError(str(error).rpartition(f"{DataError.__module__}.DataError: ")[2].strip()) from None
