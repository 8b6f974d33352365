"""Batches from real shards: the same for every number of ranks and loader processes, and from any step on."""

from __future__ import annotations

import gc
import io
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from clae_dist.config import Augment, Batch, Config, Data, Optim, Train
from clae_dist.data import decode, loader
from clae_dist.data.augment import augment
from clae_dist.data.decode import as_tensor, torchvision_decoder
from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.loader import LoadedBatch as Views
from clae_dist.data.loader import load
from clae_dist.data.manifest import Manifest
from clae_dist.data.shard_set import open_shards
from clae_dist.data.shards import ShardReader
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import DataError
from clae_dist.world import World

STEPS = 10  # an epoch (40 images, batches of 8: 5 steps) and the next


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("data") / "shards", 40, 20, num_shards=3)


def batches(
    manifest: Manifest, rank: int = 0, size: int = 1, workers: int = 0, first: int = 0, augment: Augment | None = None
) -> list[Views]:
    data = Data(image_size=16, streams=4, shuffle_shards=2, workers=workers)
    optim = Optim(warmup_epochs=0)
    config = Config(
        data=data, batch=Batch(global_size=8), augment=augment or Augment(), optim=optim, train=Train(epochs=STEPS / 5)
    )
    return list(load(manifest, config, replace(World.single("cpu"), rank=rank, size=size), first, STEPS))


def together(parts: list[Views]) -> Views:
    *tensors, bad, strengths, metadata, _, _ = zip(*parts, strict=True)
    joined = [torch.cat(part, dim=1 if part[0].dim() > 1 else 0) for part in tensors]
    skipped = {sample: reason for part in bad for sample, reason in part.items()}
    return Views(*joined, skipped, strengths[0], [files for part in metadata for files in part])


def assert_same(found: Views, wanted: Views) -> None:
    for name, a, b in zip(Views._fields, found, wanted, strict=True):
        assert a == b if name in ("bad", "strength", "metadata", "local", "took") else torch.equal(a, b), name


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on machines with fewer cores
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_same_pixels_for_every_number_of_ranks_and_workers(manifest: Manifest, size: int, workers: int) -> None:
    wanted = batches(manifest)
    parts = [batches(manifest, rank, size, workers if rank == 0 else 0) for rank in range(size)]
    for step in range(STEPS):
        assert_same(together([part[step] for part in parts]), wanted[step])


def test_batches_come_on_after_a_schedulers_sigterm(manifest: Manifest) -> None:
    """Slurm sends it to every process of a job; the rank has a step to end and a checkpoint to write."""
    config = Config(data=Data(image_size=16, streams=4, shuffle_shards=2, workers=1), batch=Batch(global_size=8))
    arriving = load(manifest, config, World.single("cpu"), 0, STEPS)
    found = [next(arriving)]
    (server,) = [child for child in psutil.Process().children() if "clae_dist.data.preload" in " ".join(child.cmdline())]
    try:
        assert server.children()
        for process in (server, *server.children()):
            process.terminate()
        found += arriving
    finally:  # it will be gone half a minute from now: the next test is not to meet it
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
    for batch, same in zip(found, batches(manifest), strict=True):
        assert_same(batch, same)


@pytest.mark.parametrize("workers", [0, 1])
def test_from_any_step_on(manifest: Manifest, workers: int) -> None:
    wanted = batches(manifest)
    for found, same in zip(batches(manifest, workers=workers, first=7), wanted[7:], strict=True):
        assert_same(found, same)


def test_an_epoch_shows_every_image_once_with_its_label(manifest: Manifest) -> None:
    found = batches(manifest)
    for epoch in (found[:5], found[5:]):
        ids = torch.cat([batch.ids for batch in epoch])
        assert sorted(ids.tolist()) == list(range(40))
        assert torch.equal(torch.cat([batch.labels for batch in epoch]), ids % 2)
    assert not torch.equal(found[0].ids, found[5].ids)


def test_the_two_views_and_two_epochs_of_an_image_differ(manifest: Manifest) -> None:
    found = batches(manifest)
    first, second = found[0], together(found[5:])
    assert not torch.equal(first.views[0], first.views[1])
    assert not torch.equal(first.draws[0], first.draws[1])
    again = int((second.ids == first.ids[0]).nonzero())
    assert not torch.equal(second.draws[0, again], first.draws[0, 0])


def test_an_annealed_augmentation_is_a_function_of_the_epoch(manifest: Manifest) -> None:
    """The first epoch is that of the recipe, the second has half of it, wherever a run begins."""
    annealed, plain = Augment(anneal_epochs=1), Augment()
    found = batches(manifest, augment=annealed)
    for batch, same in zip(found[:5], batches(manifest)[:5], strict=True):
        assert_same(batch, same)
    for batch, same in zip(found[5:], batches(manifest, augment=plain.weakened(0.5), first=5), strict=True):
        assert_same(batch, same._replace(strength=0.5))
    for batch, same in zip(batches(manifest, augment=annealed, first=7, workers=1), found[7:], strict=True):
        assert_same(batch, same)


def test_what_is_left_of_an_annealed_augmentation() -> None:
    augment = Augment(crop_scale=(0.1, 1.0), brightness=0.4, hue=0.1, blur=0.5, anneal_epochs=50)
    strengths = [augment.strength(epoch, 1000) for epoch in range(1000)]
    assert len(set(strengths)) == 20
    assert strengths[:51] == [1.0] * 50 + [0.95]
    assert strengths[-1] == pytest.approx(0.05)
    assert augment.weakened(1.0) == augment
    half, none = augment.weakened(0.5), augment.weakened(0.0)
    assert (half.crop_scale, half.jitter, half.brightness, half.grey) == ((0.55, 1.0), 0.4, 0.2, 0.1)
    assert none.crop_scale == (1.0, 1.0)
    assert none.jitter == none.grey == none.blur == none.hue == 0
    assert none.flip == augment.flip


def test_a_draw_that_rounds_to_one_is_still_below_it(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in 30 million draws: the same step would fail again after every restart."""
    monkeypatch.setattr(loader, "uniforms", lambda count, *parts: np.full((len(parts[-1]), count), 1 - 2.0**-26))
    batch = batches(manifest)[0]
    assert batch.draws.max() < 1
    images = batch.views[0] / 255
    augmented = augment(images, batch.draws[0], Augment(jitter=1.0))
    plain = augment(images, batch.draws[0], Augment(jitter=0.0))
    assert torch.isfinite(augmented).all()
    assert not torch.equal(augmented, plain)  # what is certain happens


def test_a_shard_cut_short_is_named(manifest: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    broken = write_synthetic_set(folder, 40, 20, num_shards=3)
    shard = folder / broken.splits["train"][1].name
    shard.write_bytes(shard.read_bytes()[:-1024])
    reader = ShardReader(broken, "train")
    reader.read(0, 0)
    with pytest.raises(DataError, match=r"train-000001\.tar has \d+ bytes, the manifest expects \d+"):
        reader.read(1, 0)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    broken = write_synthetic_set(folder, 10, 20)
    damage(broken, 0, [3])
    with pytest.raises(DataError, match=r"sample 3 of train-000000\.tar cannot be decoded"):
        ShardReader(broken, "train").read(0, 3)
    assert evaluated(broken) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def evaluated(manifest: Manifest) -> list[int]:
    return [int(sample) for batch in EvaluationSet(manifest, "train", 16).batches(4) for sample in batch.positions]


def damage(manifest: Manifest, shard: int, rows: Iterable[int]) -> None:
    record = manifest.splits["train"][shard]
    path = manifest.folder / record.name
    data = bytearray(path.read_bytes())
    for row in rows:
        offset = int(manifest.index(record)[row, 0])
        data[offset : offset + 8] = b"notaJPEG"
    path.write_bytes(data)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_what_stands_in_for_a_damaged_image_depends_on_nothing_but_the_shard(tmp_path: Path, size: int, workers: int) -> None:
    whole = write_synthetic_set(tmp_path / "shards", 40, 20, num_shards=3)
    right = together(batches(whole)[:5])
    damage(whole, 1, [2, 3, 12])  # the last one is followed by the first
    parts = [batches(whole, rank, size, workers if rank == 0 else 0) for rank in range(size)]
    found = [together([part[step] for part in parts]) for step in range(5)]
    assert {sample for batch in found for sample in batch.bad} == {f"sample {row} of train-000001.tar" for row in (2, 3, 12)}
    reader = ShardReader(whole, "train")
    for row, instead in ((2, 4), (3, 4), (12, 0)):
        found_there = reader.read_or_next(1, row)
        assert torch.equal(found_there.image, reader.read(1, instead)[0])
        assert found_there.label == reader.read(1, instead)[1]
    first = int(sum(reader.sizes[:1]))
    ids = torch.cat([batch.ids for batch in found])
    assert torch.equal(ids, right.ids)  # batches keep their size and their places
    same = ~torch.isin(ids, torch.tensor([first + row for row in (2, 3, 12)]))
    views = torch.cat([batch.views for batch in found], 1)
    assert torch.equal(views[:, same], right.views[:, same])
    assert not torch.equal(views, right.views)


def test_a_shard_without_a_good_image(tmp_path: Path) -> None:
    broken = write_synthetic_set(tmp_path / "shards", 10, 20)
    damage(broken, 0, range(10))
    with pytest.raises(DataError, match=r"none of the 10 samples of train-000000\.tar can be decoded"):
        ShardReader(broken, "train").read_or_next(0, 3)


def test_evaluation_batches_cover_a_split_once_however_it_is_shared(manifest: Manifest) -> None:
    split = EvaluationSet(manifest, "test", 16)
    assert len(split) == 40
    parts = [list(split.batches(7, start=rank, step=3)) for rank in range(3)]
    ids = np.concatenate([batch.positions for part in parts for batch in part])
    assert sorted(ids) == list(range(40))
    first = parts[0][0]
    assert first.views.shape == (7, 3, 16, 16)
    assert torch.equal(first.labels, first.positions % 2)
    assert len(EvaluationSet(manifest, "test", 16, limit=9, seed=1)) == 9


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on machines with fewer cores
@pytest.mark.parametrize(("start", "step"), [(0, 1), (1, 3)])
def test_evaluation_batches_are_the_same_with_loader_processes(manifest: Manifest, start: int, step: int) -> None:
    wanted = list(EvaluationSet(manifest, "test", 16, limit=31).batches(4, start, step))
    found = list(EvaluationSet(manifest, "test", 16, limit=31, workers=2).batches(4, start, step))
    for batch, same in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch[:3], same[:3], strict=True))


def test_a_split_that_is_not_there(manifest: Manifest) -> None:
    with pytest.raises(DataError, match="has no split 'val'; it has test, train"):
        ShardReader(manifest, "val")


def test_an_empty_shard_is_named(tmp_path: Path) -> None:
    """Found by fuzzing: mapping an empty file is a ValueError that names nothing."""
    empty = write_synthetic_set(tmp_path / "set", 2, 16)
    (tmp_path / "set" / "train-000000.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-000000.tar has 0 bytes, the manifest expects"):
        ShardReader(empty, "train").read(0, 0)


def test_the_decoder_is_handed_the_mapped_bytes_themselves(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each JPEG was copied once on its way, since torch warns of a buffer that cannot be written to."""
    handed: list[torch.Tensor] = []
    real = torchvision_decoder()
    assert real is not None
    monkeypatch.setattr(decode, "torchvision_decoder", lambda: lambda data: [handed.append(data), real(data)][1])
    reader = ShardReader(manifest, "train")
    reader.read(1, 3)
    mapped = np.frombuffer(reader.encoded(1, 3)[0], np.uint8)
    assert handed[0].data_ptr() == mapped.ctypes.data


def test_bytes_stay_readable_when_their_shard_is_let_go(tmp_path: Path) -> None:
    """A shard that is unmapped under a decoder would end the process."""
    made = write_synthetic_set(tmp_path / "shards", 12, 20, num_shards=3)
    reader = ShardReader(made, "train")
    reader._open = lru_cache(1)(reader._map)  # two shards at a time would be one too many
    held = as_tensor(reader.encoded(0, 0)[0])
    wanted = bytes(reader.encoded(0, 0)[0])
    for shard in (1, 2):
        reader.read(shard, 0)
    (made.folder / "train-000000.tar").unlink()
    gc.collect()
    assert bytes(held.tolist()) == wanted


def tar_with(path: Path, samples: list[list[tuple[str, bytes]]]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (file for sample in samples for file in sample):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("workers", [0, 1])
def test_metadata_comes_along_when_it_is_asked_for(tmp_path: Path, manifest: Manifest, workers: int) -> None:
    """Whatever the order of a sample's files; JSON that is none is bytes as any other; who did not ask gets nothing."""
    reader = ShardReader(manifest, "train")
    jpeg = bytes(reader.encoded(0, 0)[0])
    long = "n" * 150  # a name with an extended header of its own
    samples = [
        [("a.jpg", jpeg), ("a.json", b'{"x": 1}'), ("a.txt", b"text of a")],
        [("b.json", b"{"), ("b.txt", "\u00e4".encode()), ("b.jpg", jpeg)],
        [("none.txt", b"of no image")],
        [(f"{long}.txt", b"long"), (f"{long}.jpg", jpeg), (f"{long}.seg.png", b"mask")],
        [("d.jpg", jpeg), ("d.cls", b"cat")],
    ]
    tar_with(tmp_path / "plain.tar", samples)
    wanted = [{"json": b'{"x": 1}', "txt": b"text of a"}, {"json": b"{", "txt": b"\xc3\xa4"}, {"txt": b"long"}, {}]
    for kinds, metadata in ((("json", "txt"), wanted), ((), [])):
        data = Data(str(tmp_path / "plain.tar"), cache=str(tmp_path / "cache"), image_size=16, workers=workers, metadata=kinds)
        said: list[str] = []
        config = Config(data=data, batch=Batch(global_size=4))
        (batch,) = load(open_shards(data, say=said.append), config, World.single("cpu"), 0, 1)
        assert list(batch.metadata) == ([metadata[row] for row in batch.ids.tolist()] if kinds else [])
        assert batch.labels.tolist() == [0 if row == 3 else -1 for row in batch.ids.tolist()]  # the only class, "cat"
        assert sum("b.json" in line for line in said) == 1, said
