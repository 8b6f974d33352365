"""`clae bench data`: from shards to views on the device by stages, compared with the usual pipelines; cores that a GPU needs.

# n images of a chunk, S side of a view. Everything but the loaders runs on one core with one thread.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from clae_dist.bench import data_peers as peers
from clae_dist.bench.chunk import Chunk, DataBench
from clae_dist.bench.loaders import measure_loaders
from clae_dist.bench.measure import Row, Runs, Say, UnequalError, cpu_figure, make_rows, time_in_turns
from clae_dist.bench.outcome import Outcome
from clae_dist.config import Augment, Data
from clae_dist.data.augment import AUGMENT_DRAWS
from clae_dist.data.augment_views import augment_views
from clae_dist.data.decode import as_tensor, decode_rgb
from clae_dist.data.loader import TrainingViews, make_order
from clae_dist.data.shard_set import open_shards
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.devices import local_device

FULL = DataBench()
QUICK = DataBench(image_size=64, chunk=8, repeats=3, workers=(0, 1), batches=2, rounds=2)

_DRAWN = 500  # images whose augmentations are compared as distributions
_APART = 0.05  # of the range of a pixel: four times the difference of two such draws of ours
_DECODERS_APART = 8.0  # of 255 levels, on average: a GPU's decoder interpolates colours in another way
_LEVELS = 3  # of 255: two decoders and two antialiased resizers round differently


def bench(settings: DataBench, say: Say) -> Outcome:
    """Raises ConfigError, DataError and UnequalError."""
    device = local_device()
    with _one_thread(), tempfile.TemporaryDirectory() as folder:
        if settings.shards:
            manifest = open_shards(Data(shards=settings.shards), say=say)
            note = f"images: {manifest.name}, {manifest.num_samples(settings.split)} of {settings.split}"
        else:
            manifest = write_synthetic_set(Path(folder) / "shards", 96, 500)
            note = "images: synthetic, 500 x 500 pixels; name a folder of shards to measure with yours"
        chunk = Chunk.of(manifest, settings)
        rows = [*_crops(chunk, settings, device, say), *_stages(chunk, settings, device, say)]
        if device.type == "cuda":
            rows += decoding(chunk, settings, device, say)
        rows += _augmentations(chunk, settings, device, say)
        rows += [*_batches(chunk, settings, device, say), *_samples(chunk, settings, device, say)]
        rows += measure_loaders(chunk, settings, say)
        return Outcome(rows, device, [note, *_advice(rows, settings)])


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(case: str, runs: Runs, count: int, settings: DataBench, device: torch.device, floor: str = "") -> list[Row]:
    """Seconds per image; `floor` is the name of the run that is a lower bound of the others."""
    in_turns = time_in_turns({name: run for name, (_, run) in runs.items()}, device, settings.repeats)
    times = {name: each.per(count) for name, each in in_turns.items()}
    floor_s = times[floor].median_s if floor else None
    figures = {
        name: {"floor_s": floor_s, "more": {"images_per_s": 1 / each.median_s, **cpu_figure(each, device)}}
        for name, each in times.items()
    }
    return make_rows(case, {name: note for name, (note, _) in runs.items()}, times, figures)


def _crops(chunk: Chunk, settings: DataBench, device: torch.device, say: Say) -> list[Row]:
    say("JPEG to two crops: equal?")
    size = settings.image_size
    differences = (chunk.crops().int() - peers.pil_crops(chunk.jpegs, chunk.boxes, size).int()).abs()
    if (differences > _LEVELS).float().mean() > 1e-3:
        largest, mean = differences.max(), differences.float().mean()
        raise UnequalError(f"two crops differ from Pillow's by up to {largest} of 255 levels, {mean:.2f} on average.")
    say("JPEG to two crops: time")
    runs: Runs = {
        "ours": ("decoded once, two antialiased crops, uint8", chunk.crops),
        "pil": (
            "Pillow decodes once, torchvision crops and makes uint8 tensors",
            lambda: peers.pil_crops(chunk.jpegs, chunk.boxes, size),
        ),
        "decode": ("our decoder alone", lambda: [decode_rgb(data) for data in chunk.jpegs]),
        "huffman": ("entropy decoding alone, the floor of every decoder", lambda: peers.huffman_only(chunk.jpegs)),
    }
    return _measure("an image: JPEG to two crops, one core", runs, len(chunk.jpegs), settings, device, "huffman")


def _stages(chunk: Chunk, settings: DataBench, device: torch.device, say: Say) -> list[Row]:
    say("stages: time")
    count, size = len(chunk.jpegs), settings.image_size
    places = [chunk.reader.place(sample) for sample in range(count)]
    moved = chunk.crops(chunk.images)
    host = moved.pin_memory() if device.type == "cuda" else moved
    draws = torch.rand(2, count, AUGMENT_DRAWS, generator=torch.Generator().manual_seed(0))
    on_device, strong = moved.to(device), replace(Augment(), blur=0.5)
    target = torch.empty((2, count, size, size, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)

    def collate() -> None:
        for view in (0, 1):
            for row in range(count):
                target[view, row] = moved[view, row]

    runs: Runs = {
        "read": ("bytes out of the memory-mapped shard", lambda: [bytes(chunk.reader.encoded(*place)[0]) for place in places]),
        "decode": ("JPEG to uint8 pixels", lambda: [decode_rgb(data) for data in chunk.jpegs]),
        "crop": ("two antialiased crops, written into the batch", lambda: chunk.crops(chunk.images)),
        "collate": ("of which copying into the batch", collate),
        "transfer": (f"the batch of both views to {device.type}", lambda: host.to(device, copy=True)),
        "augment": (
            f"flip, jitter, grey and blur of both views on {device.type}",
            lambda: augment_views(on_device, draws, [strong] * 2, device, torch.float32),
        ),
    }
    return _measure("an image: each stage, one core", runs, count, settings, device)


def decoding(chunk: Chunk, settings: DataBench, device: torch.device, say: Say) -> list[Row]:
    """JPEG decoding on the GPU, by torchvision, against one core of the host. Raises UnequalError."""
    say("JPEG decoding on the device: equal?")
    encoded = [as_tensor(data) for data in chunk.jpegs]

    def on_device() -> list[torch.Tensor]:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of torchvision, for torchcodec
            return decode_jpeg(encoded, ImageReadMode.RGB, device=device)

    there = [image.cpu().int() for image in on_device()]
    pairs = zip(map(decode_rgb, chunk.jpegs), there, strict=True)
    apart = max((a.int() - b).abs().float().mean().item() for a, b in pairs if a.shape == b.shape)  # one may be turned by EXIF
    if apart > _DECODERS_APART:
        raise UnequalError(f"decoding on {device.type} differs from ours by {apart:.2f} of 255 levels on average.")
    say("JPEG decoding on the device: time")
    size = sum(map(len, chunk.jpegs)) / len(chunk.jpegs)
    runs: Runs = {
        "host": (f"on one core, to pixels in host memory; {size:,.0f} B an image", lambda: list(map(decode_rgb, chunk.jpegs))),
        "device": (
            f"torchvision's decode_jpeg of the batch, to pixels on {device.type}, bytes sent; {apart:.2f} of 255 levels apart",
            on_device,
        ),
    }
    return _measure("an image: JPEG decoding, one core and the device", runs, len(chunk.jpegs), settings, device)


def _augmentations(chunk: Chunk, settings: DataBench, device: torch.device, say: Say) -> list[Row]:
    """Augmentation after the crop, compared with packages whose draws differ: the distributions must be equal."""
    say("augmentation: equal as distributions?")
    size, strong = settings.image_size, replace(Augment(), blur=0.5)
    views = chunk.crops(chunk.images)[:1].to(device)
    images = views[0].contiguous().float() / 255
    one_by_one, kornia = v2.Compose(peers.photometric(size)), peers.kornia_photometric(size)
    runs: Runs = {
        "ours": (
            "batched, each image with its own draws, of uint8 pixels",
            lambda: augment_views(views, torch.rand(1, len(images), AUGMENT_DRAWS), [strong], device, torch.float32)[0],
        ),
        "v2": (
            "torchvision v2, image by image, as each needs its own draws",
            lambda: torch.stack(list(map(one_by_one, images))),
        ),
    }
    if kornia is not None:
        runs = {**runs, "kornia": ("batched, each image with its own draws", lambda: kornia(images))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        repeats = -(-_DRAWN // len(images))
        facts = {name: _facts(torch.cat([run() for _ in range(repeats)])) for name, (_, run) in runs.items()}
    for name, theirs in facts.items():
        if (theirs - facts["ours"]).abs().max() > _APART:
            raise UnequalError(
                f"augmentation: {name} has mean, deviation, contrast and saturation {theirs}, ours {facts['ours']}."
            )
    say("augmentation: time")
    return _measure(f"a view: what follows the crop, on {device.type}", runs, len(images), settings, device)


def _facts(images: torch.Tensor) -> torch.Tensor:
    """Mean, standard deviation, contrast within an image and saturation of a batch."""
    within, saturation = images.std((1, 2, 3)).mean(), (images.amax(1) - images.amin(1)).mean()
    return torch.stack([images.mean(), images.std(), within, saturation]).cpu()


def _batches(chunk: Chunk, settings: DataBench, device: torch.device, say: Say) -> list[Row]:
    say("JPEG to a batch: time")
    data = TrainingViews(chunk.reader, make_order(chunk.config, chunk.reader), chunk.config, 0, 1)
    v1, v2 = (peers.PilPairs(chunk.jpegs, settings.image_size, of) for of in ("v1", "v2"))
    runs: Runs = {
        "ours": ("crops on the host, the rest of the augmentation on the device", lambda: data[0]),
        "pil_simclr": ("Pillow and torchvision's transforms, all on the host", lambda: [v1[row] for row in range(len(v1))]),
        "v2_simclr": (
            "Pillow decodes, torchvision v2 on uint8 tensors, all on the host",
            lambda: [v2[row] for row in range(len(v2))],
        ),
    }
    return _measure("an image: JPEG to host-ready batch, one core", runs, len(chunk.jpegs), settings, device)


def _samples(chunk: Chunk, settings: DataBench, device: torch.device, say: Say) -> list[Row]:
    """The samples of the first shard, one in memory at a time."""
    say("shard to samples: equal?")
    reader, first = chunk.reader, chunk.manifest.shards(settings.split)[0]
    with chunk.manifest.open(first) as file:  # fetched first if it is remote
        path, rows = Path(file.name), range(first.samples)

    def ours() -> None:
        for row in rows:
            as_tensor(reader.encoded(0, row)[0])

    def ours_copied() -> None:
        for row in rows:
            bytes(reader.encoded(0, row)[0])

    def plain() -> None:
        deque(peers.webdataset_samples(path), maxlen=0)

    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        theirs = peers.webdataset_samples(path)
        for row in rows:  # quarantined images are in the shard but not in its index
            mine = reader.encoded(0, row)[0]
            if not any(mine == data for data in theirs):
                raise UnequalError(f"plain WebDataset yields sample {row} of {first.name} in another order or not at all.")
        deque(theirs, maxlen=0)
        runs: Runs = {
            "ours": ("the decoder's input: a tensor over the mapped bytes, which are not read yet", ours),
            "ours_copied": ("copied into bytes objects, as in WebDataset", ours_copied),
            "webdataset": ("plain WebDataset, undecoded", plain),
        }
        return _measure("an image: shard to encoded samples, one core", runs, first.samples, settings, device)


def _advice(rows: Sequence[Row], settings: DataBench) -> Iterator[str]:
    """The number of cores that a GPU needs."""
    ours = next(row for row in rows if row.case.startswith("an image: JPEG to host-ready") and row.name == "ours")
    a_core = 1 / ours.median_s
    yield f"one core prepares {a_core:.0f} images per second (both views of {settings.image_size} pixels)"
    if settings.rate:
        cores = settings.rate / a_core
        yield f"a GPU with {settings.rate:g} images per second needs {cores:.1f} cores: data.workers={math.ceil(cores)}"
