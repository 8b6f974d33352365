"""Plain shards without a manifest: from paths, http, pipes; the same samples everywhere, and what is lost is said once."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.bench.measure import replaced
from clae_dist.config import Batch, Config, Data
from clae_dist.data import fetch as fetching
from clae_dist.data import together
from clae_dist.data.loader import load
from clae_dist.data.manifest import Manifest
from clae_dist.data.remote import FOLDER
from clae_dist.data.shard_set import open_shards
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import DataError
from clae_dist.world import World
from tests.http_faults import Fault, FaultyServer, serve
from tests.ranks import RankPool


@pytest.fixture
def prepared(tmp_path: Path) -> Manifest:
    return write_synthetic_set(tmp_path / "shards", 20, 20, num_shards=3)


@pytest.fixture
def server(prepared: Manifest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(fetching, "_FIRST_PAUSE_S", 0.001)
    with serve(prepared.folder) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(shards: str, cache: Path, lines: list[str] | None = None, **data: Any) -> Manifest:
    said: list[str] = [] if lines is None else lines
    return open_shards(Data(shards=shards, cache=str(cache), timeout_s=0.3, **data), say=said.append)


def images(manifest: Manifest, split: str = "train") -> list[tuple[bytes, int]]:
    found = []
    for shard in manifest.shards(split):
        with manifest.open(shard) as file:
            content = file.read()
        found += [(content[offset : offset + size], label) for offset, size, label in manifest.index(shard).tolist()]
    return found


@pytest.mark.parametrize("where", ["local", "http", "pipe"])
def test_the_same_samples_as_with_the_manifest(prepared: Manifest, server: FaultyServer, cache: Path, where: str) -> None:
    name = "train-{000000..000002}.tar"
    text = {"local": f"{prepared.folder}/{name}", "http": f"{server.url}/{name}", "pipe": f"pipe:cat {prepared.folder}/{name}"}
    lines: list[str] = []
    found = opened(text[where], cache, lines)
    assert images(found) == images(prepared)
    assert (found.classes, list(found.splits)) == (("0", "1"), ["train"])
    (line,) = lines
    assert "3 plain shards without a manifest: no checksums" in line
    assert ("each is fetched once" in line) == (where != "local")
    again = opened(text[where], cache)
    assert (again.digest, images(again)) == (found.digest, images(found))
    assert set(server.requests.values()) == ({1} if where == "http" else set())


def test_a_resumed_run_notices_other_shards(prepared: Manifest, cache: Path) -> None:
    text = f"{prepared.folder}/train-{{000000..000002}}.tar"
    before = opened(text, cache)
    assert opened(f"{prepared.folder}/train-{{000000..000001}}.tar", cache).digest != before.digest
    shutil.copy(prepared.folder / "test-000000.tar", prepared.folder / "train-000000.tar")
    assert opened(text, cache).digest != before.digest


def test_what_the_cache_has_lost_is_had_again(prepared: Manifest, server: FaultyServer, cache: Path) -> None:
    manifest = opened(f"{server.url}/train-{{000000..000002}}.tar", cache)
    for path in [*(cache / FOLDER).glob("*.npy"), *(cache / FOLDER).glob("*.tar")]:
        path.unlink()
    assert images(manifest) == images(prepared)
    for path in (cache / FOLDER).glob("*.tar"):
        path.unlink()
    shutil.copy(prepared.folder / "test-000000.tar", prepared.folder / "train-000000.tar")
    with pytest.raises(DataError, match=r"train-000000\.tar could not be fetched .* expected"):  # within a run it is noticed
        images(manifest)


def test_faults_are_met_without_sizes_known(prepared: Manifest, server: FaultyServer, cache: Path) -> None:
    server.faults["train-000000.tar"] = [Fault("no_length", 3000), Fault("cut", 2000), Fault("stall", 10)]
    server.faults["train-000001.tar"] = [Fault("no_length", 0), Fault("status", code=500)]
    assert images(opened(f"{server.url}/train-{{000000..000002}}.tar", cache)) == images(prepared)


def test_one_bad_tar_is_named(prepared: Manifest, server: FaultyServer, cache: Path) -> None:
    shard = prepared.folder / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-10_000])
    for place in (str(prepared.folder), server.url):
        with pytest.raises(DataError, match=r"train-000001\.tar .*cut short"):
            opened(f"{place}/train-{{000000..000002}}.tar", cache)
    with pytest.raises(DataError, match=r"nothing\.tar cannot be read \(No such file or directory\)"):
        opened(f"{prepared.folder}/nothing.tar", cache)


def test_names_that_two_shards_share_are_told_apart(prepared: Manifest, tmp_path: Path, cache: Path) -> None:
    shutil.copytree(prepared.folder, tmp_path / "other")
    manifest = opened(f"{{{prepared.folder},{tmp_path / 'other'}}}/train-000000.tar", cache)
    assert [shard.name for shard in manifest.splits["train"]] == ["000000-train-000000.tar", "000001-train-000000.tar"]


def test_streams_without_labels_train(prepared: Manifest, tmp_path: Path, cache: Path) -> None:
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        for number, (data, _) in enumerate(images(prepared)):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = Data(shards=str(tmp_path / "plain.tar"), cache=str(cache), image_size=16, workers=0)
    manifest = open_shards(data)
    assert manifest.classes == ()
    config = Config(data=data, batch=Batch(global_size=4))
    (batch,) = load(manifest, config, World.single("cpu"), 0, 1)
    assert torch.equal(batch.labels, torch.full((4,), -1))


def packed(path: Path, image: bytes, labels: list[str | None]) -> None:
    """A shard of one image under many keys."""
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels):
            for kind, content in (("jpg", image), ("cls", (label or "").encode())):
                if kind == "jpg" or label is not None:
                    info = tarfile.TarInfo(f"{number}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("shards", "classes"),
    [
        ([["dog", "cat", None], ["ant", "7", "dog"]], ("7", "ant", "cat", "dog")),
        ([["999999", "7", None], ["123456", "7", "1"]], ("1", "7", "123456", "999999")),
        ([["0", "2", "1"], ["1", "1", "0"]], ("0", "1", "2")),
        ([["3", "10"], ["café", "cafe\u0301"]], ("10", "3", "café")),  # one name in two forms of Unicode
    ],
)
def test_classes_are_the_labels_that_there_are(
    prepared: Manifest, tmp_path: Path, cache: Path, shards: list[list[str | None]], classes: tuple[str, ...]
) -> None:
    """One name made all labels -1, and an id of 999999 a million classes."""
    image, lines = images(prepared)[0][0], list[str]()
    for number, labels in enumerate(shards):
        packed(tmp_path / f"x-{number}.tar", image, labels)
    for _ in range(2):
        manifest = opened(f"{tmp_path}/x-{{0..1}}.tar", cache, lines)
        found = [manifest.classes[label] if label >= 0 else None for _, label in images(manifest)]
        assert manifest.classes == classes
        wanted = [unicodedata.normalize("NFC", label) if label else None for labels in shards for label in labels]
        assert found == wanted
        for path in (cache / FOLDER).glob("*.npy"):
            path.unlink()  # lost: indexed again when it is read
    without = sum(label is None for labels in shards for label in labels)
    assert ("data: images without a label: 1 of 6" in lines) == bool(without)
    assert Manifest.index(pickle.loads(pickle.dumps(manifest)), manifest.splits["train"][0]).shape == (len(shards[0]), 3)


def test_what_is_dropped_is_said(prepared: Manifest, tmp_path: Path, cache: Path) -> None:
    lines: list[str] = []
    packed(tmp_path / "x.tar", images(prepared)[0][0], ["1 3 5", "0", "2.5"])
    opened(str(tmp_path / "x.tar"), cache, lines)
    text = "labels that are neither names nor non-negative integers, ignored: 2, such as \"0.cls (several labels: '1 3 5')\""
    assert f"data: {text}" in lines


def test_ranks_index_a_share_each_and_fail_together(ranks: RankPool, prepared: Manifest, cache: Path) -> None:
    data = Data(shards=f"{prepared.folder}/train-{{000000..000002}}.tar", cache=str(cache))
    found = ranks.run(2, rank_open, data)
    assert found[0] == found[1] == open_shards(data).digest
    (prepared.folder / "train-000001.tar").write_bytes(b"")
    found = ranks.run(2, rank_open, data)
    assert found[0] == found[1]
    assert "train-000001.tar is empty" in found[0]


def test_ranks_agree_on_the_classes(ranks: RankPool, prepared: Manifest, tmp_path: Path, cache: Path) -> None:
    """Each knows the labels of its own shards only."""
    for number, labels in enumerate((["dog", "cat"], ["ant", "70000"])):
        packed(tmp_path / f"x-{number}.tar", images(prepared)[0][0], list(labels))
    found = ranks.run(2, rank_classes, Data(shards=f"{tmp_path}/x-{{0..1}}.tar", cache=str(cache)))
    assert found[0] == found[1] == (("70000", "ant", "cat", "dog"), [3, 2, 1, 0])


def rank_classes(world: World, data: Data) -> tuple[tuple[str, ...], list[int]]:
    manifest = open_shards(data, world)
    return manifest.classes, [int(label) for shard in manifest.splits["train"] for label in manifest.index(shard)[:, 2]]


def test_a_rank_whose_shard_takes_longer_than_a_collective_may(
    ranks: RankPool, prepared: Manifest, server: FaultyServer, cache: Path
) -> None:
    """The others waited for it in a collective, which ends after its timeout, and the run with it."""
    server.faults["train-000001.tar"] = [Fault("stall", 10)] * 4
    data = Data(shards=f"{server.url}/train-{{000000..000001}}.tar", cache=str(cache), timeout_s=0.3)
    found = ranks.run(2, rank_open_counting, data)
    assert found[0][0] == found[1][0] == open_shards(data).digest
    assert min(asked for _, asked in found) >= 2  # short collectives while it was fetched


def rank_open_counting(world: World, data: Data) -> tuple[str, int]:
    calls: list[bool] = []
    real = World.flags_anywhere

    def counted(self: World, *flags: bool) -> list[bool]:
        calls.append(True)
        return real(self, *flags)

    with replaced(together, _ASK_EVERY_S=0.2), replaced(World, flags_anywhere=counted):
        return open_shards(data, world).digest, len(calls)


def test_nodes_whose_caches_hold_different_versions_are_noticed(
    ranks: RankPool, prepared: Manifest, server: FaultyServer, tmp_path: Path
) -> None:
    """What a cache has is taken as it is: one node trained on other images than its neighbours, without a word."""
    text = f"{server.url}/train-{{000000..000001}}.tar"
    opened(text, tmp_path / "1")
    shard = prepared.folder / "train-000000.tar"  # the share of rank 0; node 1 has had it since before it changed
    content = bytearray(shard.read_bytes())
    index = prepared.index(prepared.splits["train"][0])
    content[index[0, 0] + 50] ^= 1  # no size and no place has changed
    shard.write_bytes(content)
    found = ranks.run(2, rank_open_own, text, tmp_path)
    assert found[0] == found[1]
    assert "has other content" in found[0]
    assert "empty data.cache on every node" in found[0]


def rank_open_own(world: World, text: str, folder: Path) -> str:
    node = replace(world, local_rank=0, local_size=1)
    return rank_open(node, Data(shards=text, cache=str(folder / str(world.rank))))


def rank_open(world: World, data: Data) -> str:
    try:
        return open_shards(data, world).digest
    except DataError as error:
        return str(error)


def test_nothing_of_a_secret_is_kept(prepared: Manifest, server: FaultyServer, cache: Path) -> None:
    lines: list[str] = []
    url = server.url.replace("://", "://me:hunter2@")
    manifest = opened(f"{url}/train-{{000000..000002}}.tar", cache, lines)
    names = " ".join(path.name for path in (cache / FOLDER).iterdir())
    records = " ".join(path.read_text() for path in (cache / FOLDER).glob("*.json"))
    assert "hunter2" not in f"{names}{records}{lines}{manifest!r}{replace(manifest, files=None)}"
