"""Sets that lie elsewhere: the same batches as from the disk, whatever the server does, and each shard asked for once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from clae_dist.config import Batch, Config, Data
from clae_dist.data import fetch as fetching
from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.loader import LoadedBatch as Views
from clae_dist.data.loader import load
from clae_dist.data.manifest import Manifest, content_digest, load_manifest
from clae_dist.data.order import Order
from clae_dist.data.prefetch import Prefetch, advice
from clae_dist.data.remote import FOLDER, MAX_OPEN, Fetching
from clae_dist.data.shard_set import open_shards
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import DataError
from clae_dist.world import World
from tests.http_faults import Fault, FaultyServer, serve
from tests.ranks import RankPool

STEPS = 10  # two epochs of 40 images


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("data") / "shards", 40, 20, num_shards=5)


@pytest.fixture
def server(local: Manifest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(fetching, "_FIRST_PAUSE_S", 0.001)
    with serve(local.folder) as running:
        yield running


def settings(shards: str, cache: Path, **data: Any) -> Config:
    given = {"image_size": 16, "streams": 4, "shuffle_shards": 2, "workers": 0, "timeout_s": 0.5, "cache": str(cache), **data}
    return Config(data=Data(shards=shards, **given), batch=Batch(global_size=8))


def batches(config: Config, world: World | None = None) -> list[Views]:
    return list(load(open_shards(config.data), config, world or World.single("cpu"), 0, STEPS))


def assert_same(found: list[Views], wanted: list[Views]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_an_epoch_under_faults_is_the_local_one(
    local: Manifest, server: FaultyServer, tmp_path: Path, seed: int, prefetch: int
) -> None:
    rng = random.Random(seed)  # printed as the test's parameter
    kinds = ["stall", "cut", "wrong", "short", "status", "no_length", "no_range", "drip"]
    names = [path.name for path in local.folder.iterdir()]
    server.faults = {
        name: [Fault(rng.choice(kinds), rng.randrange(1, 3000)) for _ in range(rng.randrange(3))] for name in names
    }
    for faults in server.faults.values():  # a pause of hours is another test
        faults[:] = [replace(fault, after=0) if fault.kind == "status" else fault for fault in faults]
    config = settings(server.url, tmp_path / "cache", prefetch_shards=prefetch, timeout_s=0.2)
    assert_same(batches(config), batches(settings(str(local.folder), tmp_path / "none")))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on machines with fewer cores
def test_ranks_with_loader_processes_ask_for_each_shard_once(local: Manifest, server: FaultyServer, tmp_path: Path) -> None:
    config = settings(server.url, tmp_path / "cache", workers=2, timeout_s=30.0)
    manifest = open_shards(config.data)
    world = replace(World.single("cpu"), size=2, local_size=2)
    parts = [load(manifest, config, replace(world, rank=rank, local_rank=rank), 0, STEPS) for rank in range(2)]
    for wanted in batches(settings(str(local.folder), tmp_path / "none")):
        found = [next(part) for part in parts]
        ids = torch.cat([batch.ids for batch in found])
        assert torch.equal(ids, wanted.ids)
        assert torch.equal(torch.cat([batch.views for batch in found], 1), wanted.views)
    expected = {shard.name for shard in local.splits["train"]} | {shard.index_name for shard in local.splits["train"]}
    assert server.requests == {"manifest.json": 1} | dict.fromkeys(expected, 1)


def test_ranks_share_a_cache(ranks: RankPool, local: Manifest, server: FaultyServer, tmp_path: Path) -> None:
    found = ranks.run(2, rank_ids, settings(server.url, tmp_path / "cache", timeout_s=30.0))
    wanted = [batch.ids.tolist() for batch in batches(settings(str(local.folder), tmp_path / "none"))]
    assert [a + b for a, b in zip(*found, strict=True)] == wanted
    assert set(server.requests.values()) == {1}


def rank_ids(world: World, config: Config) -> list[list[int]]:
    manifest = open_shards(config.data, world)
    return [batch.ids.tolist() for batch in load(manifest, config, world, 0, STEPS)]


def test_a_limit_of_two_shards_lasts_for_two_epochs(local: Manifest, server: FaultyServer, tmp_path: Path) -> None:
    limit = 2 * max(shard.bytes for shard in local.splits["train"]) + 10_000
    config = settings(server.url, tmp_path / "cache", cache_bytes=limit, streams=1, shuffle_shards=1)
    wanted = batches(settings(str(local.folder), tmp_path / "none", streams=1, shuffle_shards=1))
    found = []
    for batch in load(open_shards(config.data), config, World.single("cpu"), 0, STEPS):
        held = held_bytes(tmp_path / "cache" / FOLDER)
        assert held <= limit + max(shard.bytes for shard in local.splits["train"])  # one may be on its way
        found.append(batch)
    assert_same(found, wanted)
    assert not list(advice(config, open_shards(config.data), World.single("cpu")))


def held_bytes(cache: Path) -> int:
    """Of its files, some of which may go while they are counted."""
    total = 0
    for path in cache.iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_a_cache_smaller_than_what_is_in_use_is_said_and_works(local: Manifest, server: FaultyServer, tmp_path: Path) -> None:
    config = settings(server.url, tmp_path / "cache", cache_bytes=20_000, streams=4, shuffle_shards=2)
    (line,) = advice(config, open_shards(config.data), World.single("cpu"))
    assert "shards will be fetched again and again. Try data.cache_bytes=" in line
    assert_same(batches(config), batches(settings(str(local.folder), tmp_path / "none")))


def test_what_is_in_the_cache_folder_beside_the_cache_stays(local: Manifest, server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "cache" / "mine").mkdir(parents=True)
    theirs = [tmp_path / "cache" / name for name in ("weights.pt", "old.part", "mine/x")]
    for path in theirs:
        path.write_bytes(bytes(30_000))
        os.utime(path, (0, 0))
    config = settings(server.url, tmp_path / "cache", cache_bytes=20_000)
    assert_same(batches(config), batches(settings(str(local.folder), tmp_path / "none")))
    assert all(path.exists() for path in theirs)


def test_shards_that_stay_mapped_leave_the_disk_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removed file takes space for as long as any process maps it."""
    shards, processes = [500_000_000] * 300, 64
    limited = Fetching.of(Data(shards="http://h/set", cache=str(tmp_path), cache_bytes=100_000_000_000))
    assert limited.max_open(shards[:200], processes) == MAX_OPEN  # all of them stay in the cache
    assert limited.max_open(shards, 10) == 10
    assert limited.max_open(shards, processes) == 2
    usage = shutil._ntuple_diskusage(0, 0, 100_000_000_000 + (1 << 30))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    unlimited = Fetching.of(Data(shards="http://h/set", cache=str(tmp_path)))
    assert unlimited.max_open(shards[:200], processes) == MAX_OPEN
    assert unlimited.max_open(shards, 10) == 10


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_reader_of_a_set_larger_than_the_cache_lets_go_of_what_was_removed(server: FaultyServer, tmp_path: Path) -> None:
    config = settings(server.url, tmp_path / "cache", cache_bytes=30_000)
    manifest, most = open_shards(config.data), 0
    for _ in load(manifest, config, World.single("cpu"), 0, STEPS):
        maps = Path("/proc/self/maps").read_text()
        most = max(most, maps.count(str(tmp_path)))
    assert len(manifest.splits["train"]) == 5
    assert most == 2


def test_shards_are_fetched_before_a_step_asks_for_them(local: Manifest, server: FaultyServer, tmp_path: Path) -> None:
    asked = {shard.name: threading.Event() for shard in local.splits["train"]}

    def choose(name: str, _: int) -> None:
        if name in asked:
            asked[name].set()

    server.choose = choose
    config = settings(server.url, tmp_path / "cache", streams=1, shuffle_shards=1)
    found = load(open_shards(config.data), config, World.single("cpu"), 0, STEPS)
    next(found)  # eight images, all of one shard
    assert all(event.wait(20) for event in asked.values())
    config = settings(server.url, tmp_path / "another", streams=1, shuffle_shards=1, prefetch_shards=0)
    for event in asked.values():
        event.clear()
    next(load(open_shards(config.data), config, World.single("cpu"), 0, STEPS))
    assert sum(event.is_set() for event in asked.values()) == 1


def test_a_start_fetches_the_manifest_and_nothing_else(server: FaultyServer, local: Manifest, tmp_path: Path) -> None:
    manifest = open_shards(settings(server.url + "/", tmp_path / "cache").data)
    assert server.requests == {"manifest.json": 1}
    assert (manifest.digest, manifest.where) == (local.digest, server.url + "/")


def test_evaluation_reads_it_too(server: FaultyServer, local: Manifest, tmp_path: Path) -> None:
    data = settings(server.url, tmp_path / "cache").data
    found, wanted = (EvaluationSet(manifest, "test", 16).images(range(40)) for manifest in (open_shards(data), local))
    assert torch.equal(found[0], wanted[0])


def test_a_shard_that_stays_wrong_ends_the_run_by_name(server: FaultyServer, tmp_path: Path) -> None:
    server.choose = lambda name, _: Fault("wrong") if name == "train-000003.tar" else None
    config = settings(server.url.replace("://", "://me:secret@"), tmp_path / "cache")
    with pytest.raises(
        DataError, match=rf"train-000003\.tar could not be fetched from {server.url}/train-000003\.tar"
    ) as caught:
        batches(config)
    assert "sha256" in str(caught.value)
    assert "secret" not in str(caught.value) + repr(open_shards(config.data))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_is_one_line_from_a_loader_process_too(server: FaultyServer, tmp_path: Path, workers: int) -> None:
    server.choose = lambda name, _: Fault("status", code=403) if name.endswith(".tar") else None
    with pytest.raises(DataError, match=r"^train-\d{6}\.tar could not be fetched from [^\n]*the server answered 403[^\n]*$"):
        batches(settings(server.url, tmp_path / "cache", workers=workers))


def test_a_failure_reaches_every_rank(ranks: RankPool, server: FaultyServer, tmp_path: Path) -> None:
    server.choose = lambda name, _: Fault("status", code=403) if name == "manifest.json" else None
    found = ranks.run(2, rank_problem, settings(server.url, tmp_path / "cache"))
    assert len(set(found)) == 1
    assert "manifest.json could not be fetched" in found[0]


def rank_problem(world: World, config: Config) -> str:
    try:
        open_shards(config.data, world)
    except DataError as error:
        return str(error)
    return ""


def test_a_loader_killed_in_the_middle_of_a_fetch_leaves_nothing_half(
    server: FaultyServer, local: Manifest, tmp_path: Path
) -> None:
    shard = local.splits["train"][0]
    server.faults[shard.name] = [Fault("stall", 3000)]
    script = (
        "import sys; from clae_dist.config import Data; from clae_dist.data.shard_set import open_shards\n"
        "m = open_shards(Data(shards=sys.argv[1], cache=sys.argv[2])); m.open(m.splits['train'][0])"
    )
    process = os.posix_spawn(sys.executable, [sys.executable, "-c", script, server.url, str(tmp_path / "cache")], os.environ)
    assert server.reached.wait(60)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert not (tmp_path / "cache" / FOLDER / f"{shard.sha256}.tar").exists()
    with open_shards(settings(server.url, tmp_path / "cache").data).open(shard) as file:
        assert file.read() == (local.folder / shard.name).read_bytes()
    assert not list((tmp_path / "cache" / FOLDER).glob("*.part"))


@pytest.mark.slow
def test_any_store(local: Manifest, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in local.folder.iterdir():
        store.pipe(f"/bucket/set/{path.name}", path.read_bytes())
    config = settings("memory://bucket/set", tmp_path / "cache")
    assert_same(batches(config), batches(settings(str(local.folder), tmp_path / "none")))
    store.rm("/bucket", recursive=True)


@pytest.mark.parametrize("text", ['{"format": "other"}', "no json", "[]", ""])
def test_what_is_no_manifest_is_said(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_FIRST_PAUSE_S", 0.001)
    (tmp_path / "served").mkdir()
    (tmp_path / "served/manifest.json").write_text(text)
    with serve(tmp_path / "served") as server, pytest.raises(DataError, match=r"manifest\.json (is not|has format)"):
        open_shards(settings(server.url, tmp_path / "cache").data)


def test_a_manifest_cannot_name_files_outside_the_cache(local: Manifest, tmp_path: Path) -> None:
    content = json.loads((local.folder / "manifest.json").read_text())
    content["splits"]["train"][0]["sha256"] = "../../../escaped"
    content["digest"] = content_digest(content)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with serve(tmp_path) as server, pytest.raises(DataError, match="which are not SHA-256 digests; prepare the set again"):
        open_shards(settings(server.url, tmp_path / "cache").data)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_fetched_ahead_is_what_is_read(seed: int) -> None:
    """In every step a rank reads only shards that were named for this step or before, in the same epoch."""
    rng = random.Random(seed)
    sizes = [rng.randrange(1, 30) for _ in range(rng.randrange(1, 12))]
    world_size = rng.choice([1, 2, 4])
    streams = 4 * rng.choice([1, 2])
    global_size = streams * rng.randrange(1, 3)
    if sum(sizes) < global_size:
        sizes.append(global_size)
    order = Order(sizes, global_size, streams, rng.randrange(1, 4), seed)
    first = rng.randrange(2 * order.steps_per_epoch)
    steps = range(first, first + rng.randrange(1, 3 * order.steps_per_epoch))
    for rank in range(world_size):
        needs = list(order.shards_needed(steps, rank, world_size))
        assert [step for step, _ in needs] == sorted(step for step, _ in needs)
        for step in steps:
            epoch = step // order.steps_per_epoch
            known = {shard for when, shard in needs if when <= step and when // order.steps_per_epoch == epoch}
            assert set(order.batch(step, rank, world_size).shards.tolist()) <= known


def test_no_more_than_asked_is_fetched_ahead_and_the_threads_end() -> None:
    fetched: list[int] = []
    moved = threading.Condition()

    def fetch(shard: int, stop: threading.Event) -> None:
        with moved:
            fetched.append(shard)
            moved.notify_all()

    def wait_for(count: int) -> None:
        with moved:
            assert moved.wait_for(lambda: len(fetched) >= count, 20)

    before = threading.active_count()
    prefetch = Prefetch(((step, step) for step in range(100)), fetch, ahead=3, first_step=0)
    followed = prefetch.follow(iter(range(100)))
    wait_for(4)  # the step's own, and three
    for step in range(5):
        assert next(followed) == step
        wait_for(5 + step)
    assert sorted(fetched) == list(range(9))
    followed.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_local_folder_is_what_it_was(local: Manifest, tmp_path: Path) -> None:
    for text in (str(local.folder), f"file://{local.folder}"):
        assert open_shards(Data(shards=text)) == load_manifest(local.folder)
