"""`clae bench data`: from shards to views on the device, stage by stage, beside the usual ways; how many cores a GPU needs.

# n images of a chunk, S side of a view. All but the loaders run on one core with one thread.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2

from clae_dist.bench import data_peers as peers
from clae_dist.bench.chunk import Chunk, DataBench
from clae_dist.bench.loaders import measure_loaders
from clae_dist.bench.measure import Row, Say, Times, UnequalError, cpu_figure, time_in_turns, with_ratios
from clae_dist.bench.outcome import Outcome
from clae_dist.config import Augment, Data
from clae_dist.data.augment import augment
from clae_dist.data.decode import as_tensor, decode_rgb
from clae_dist.data.loader import TwoViews, make_order
from clae_dist.data.shard_set import open_shards
from clae_dist.data.synthetic import write_synthetic_set

_DRAWN = 500  # images whose augmentation is compared as a distribution
_APART = 0.05  # of the range of a pixel: four times what two such draws of ours are apart
_LEVELS = 3  # of 255: two decoders and two antialiased resizers round differently


def bench(settings: DataBench, shards: str, device: torch.device, say: Say) -> Outcome:
    """Of a split of `shards`, as data.shards names sets ("": made-up images of 500 x 500 pixels).

    Raises ConfigError, DataError and UnequalError.
    """
    with _one_thread(), tempfile.TemporaryDirectory() as folder:
        made_up = "" if shards else "images: made up, 500 x 500 pixels; name a folder of shards to measure with yours"
        manifest = (
            open_shards(Data(shards=shards), say=say) if shards else write_synthetic_set(Path(folder) / "shards", 96, 500)
        )
        chunk = Chunk.of(manifest, settings)
        rows = [*_crops(chunk, settings, device, say), *_stages(chunk, settings, device, say)]
        rows += _augmentations(chunk, settings, device, say)
        rows += [*_batches(chunk, settings, device, say), *_samples(chunk, settings, device, say)]
        rows += measure_loaders(chunk, settings, say)
        notes = (
            [made_up] if made_up else [f"images: {manifest.name}, {manifest.num_samples(settings.split)} of {settings.split}"]
        )
        return Outcome(rows, device, [*notes, *_advice(rows, settings)])


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Runs = dict[str, tuple[str, Callable[[], Any]]]


def _measure(case: str, runs: Runs, count: int, settings: DataBench, device: torch.device, floor: str = "") -> list[Row]:
    """Seconds an image; `floor` is the name of the run that nothing can beat."""
    times = time_in_turns({name: run for name, (_, run) in runs.items()}, device, settings.repeats)
    each = {name: Times(*([value / count for value in kind] for kind in (t.wall, t.cpu))) for name, t in times.items()}
    bottom = each[floor].median_s if floor else None
    return with_ratios(
        [
            Row(
                case,
                f"{name}: {note}",
                each[name].median_s,
                each[name].spread,
                {},
                bottom,
                more={"images_per_s": 1 / each[name].median_s, **cpu_figure(each[name], device)},
            )
            for name, (note, _) in runs.items()
        ]
    )


def _crops(chunk: Chunk, settings: DataBench, device: torch.device, say: Say) -> list[Row]:
    say("JPEG to two crops: equal?")
    size = settings.image_size
    found, wanted = chunk.crops(), peers.pil_crops(chunk.jpegs, chunk.boxes, size)
    apart = (found.int() - wanted.int()).abs()
    if (apart > _LEVELS).float().mean() > 1e-3:
        raise UnequalError(
            f"two crops differ from Pillow's by up to {apart.max()} of 255 levels, {apart.float().mean():.2f} on average."
        )
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
    draws = torch.rand(2, count, 10, generator=torch.Generator().manual_seed(0))
    on_device = (moved.to(device)[0].float() / 255, moved.to(device)[1].float() / 255)
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
            lambda: [augment(view, draw, replace(Augment(), blur=0.5)) for view, draw in zip(on_device, draws, strict=True)],
        ),
    }
    return _measure("an image: each stage, one core", runs, count, settings, device)


def _augmentations(chunk: Chunk, settings: DataBench, device: torch.device, say: Say) -> list[Row]:
    """Augmentation after the crop, beside other packages, whose draws differ: the distributions must be equal."""
    say("augmentation: equal as distributions?")
    size, strong = settings.image_size, replace(Augment(), blur=0.5)
    images = chunk.crops(chunk.images)[0].to(device).contiguous().float() / 255
    one_by_one, kornia = v2.Compose(peers.photometric(size)), peers.kornia_photometric(size)
    runs: Runs = {
        "ours": ("batched, each image with its own draws", lambda: augment(images, torch.rand(len(images), 10), strong)),
        "v2": (
            "torchvision v2, image by image, as each needs its own draws",
            lambda: torch.stack(list(map(one_by_one, images))),
        ),
    }
    if kornia is not None:
        runs["kornia"] = ("batched, each image with its own draws", lambda: kornia(images))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        repeats = -(-_DRAWN // len(images))
        facts = {name: _facts(torch.cat([run() for _ in range(repeats)])) for name, (_, run) in runs.items()}
    for name, found in facts.items():
        if (found - facts["ours"]).abs().max() > _APART:
            raise UnequalError(
                f"augmentation: {name} has mean, deviation, contrast and saturation {found}, ours {facts['ours']}."
            )
    say("augmentation: time")
    return _measure(f"a view: what follows the crop, on {device.type}", runs, len(images), settings, device)


def _facts(images: torch.Tensor) -> torch.Tensor:
    """Mean, standard deviation, contrast within an image, saturation: of what comes out of random draws."""
    within, saturation = images.std((1, 2, 3)).mean(), (images.amax(1) - images.amin(1)).mean()
    return torch.stack([images.mean(), images.std(), within, saturation]).cpu()


def _batches(chunk: Chunk, settings: DataBench, device: torch.device, say: Say) -> list[Row]:
    say("JPEG to a batch: time")
    data = TwoViews(chunk.reader, make_order(chunk.config, chunk.reader), chunk.config, 0, 1)
    v1, v2 = (peers.PilPairs(chunk.jpegs, settings.image_size, of) for of in ("v1", "v2"))
    runs: Runs = {
        "ours": ("moved work: crops here, the rest of the augmentation on the device", lambda: data[0]),
        "pil_simclr": ("Pillow, torchvision's transforms, all here", lambda: [v1[row] for row in range(len(v1))]),
        "v2_simclr": ("Pillow decodes, torchvision v2 on uint8 tensors, all here", lambda: [v2[row] for row in range(len(v2))]),
    }
    return _measure("an image: JPEG to host-ready batch, one core", runs, len(chunk.jpegs), settings, device)


def _samples(chunk: Chunk, settings: DataBench, device: torch.device, say: Say) -> list[Row]:
    """Through the first shard, one sample held at a time."""
    say("shard to samples: equal?")
    reader, first = chunk.reader, chunk.manifest.shards(settings.split)[0]
    with chunk.manifest.open(first) as file:  # of this machine: fetched, where it lies elsewhere
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
        for row in rows:  # images that were set aside are in the shard and not in its index
            mine = reader.encoded(0, row)[0]
            if not any(mine == data for data in theirs):
                raise UnequalError(f"plain WebDataset does not give sample {row} of {first.name}, or in another order.")
        deque(theirs, maxlen=0)
        runs: Runs = {
            "ours": ("the tensor that the decoder is handed: the mapped bytes, which it is the first to touch", ours),
            "ours_copied": ("the same as bytes objects, as WebDataset gives them", ours_copied),
            "webdataset": ("plain WebDataset, undecoded", plain),
        }
        return _measure("an image: shard to encoded samples, one core", runs, first.samples, settings, device)


def _advice(rows: Sequence[Row], settings: DataBench) -> Iterator[str]:
    """How many cores a GPU needs."""
    ours = next(row for row in rows if row.case.startswith("an image: JPEG to host-ready") and row.name == "ours")
    a_core = 1 / ours.median_s
    yield f"one core makes {a_core:.0f} images a second ready (both views of {settings.image_size} pixels)"
    if settings.rate:
        cores = settings.rate / a_core
        yield f"a GPU that takes {settings.rate:g} images a second needs {cores:.1f} cores: data.workers={math.ceil(cores)}"
