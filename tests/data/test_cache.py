"""The cache: whole files or none, one fetch for all processes, the least recently used goes first."""

from __future__ import annotations

import fcntl
import mmap
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from clae_dist.data import cache as caching
from clae_dist.data import room
from clae_dist.data.cache import MARKER, Cache
from clae_dist.errors import DataError

NAMES = re.compile("[a-z0-9]+")  # of the files in these tests


def make_cache(folder: Path, limit_bytes: int = 0) -> Cache:
    return Cache(folder, limit_bytes, NAMES)


def writes(data: bytes) -> Callable[[IO[bytes]], None]:
    def fill(part: IO[bytes]) -> None:
        part.truncate(0)
        part.write(data)

    return fill


def never(part: IO[bytes]) -> None:
    pytest.fail("it was there")


def names(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if not path.name.startswith(".")}


def test_a_file_is_filled_once(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    with cache.open("a", 3, writes(b"abc")) as file:
        assert file.read() == b"abc"
    with cache.open("a", 3, never) as file:
        assert file.read() == b"abc"
    assert names(cache) == {"a"}


def test_a_file_of_another_size_is_filled_again(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    cache.open("a", 3, writes(b"abc")).close()
    (tmp_path / "a").write_bytes(b"ab")
    with cache.open("a", 3, writes(b"abc")) as file:
        assert file.read() == b"abc"


def test_the_least_recently_used_goes_first_and_stays_readable_while_it_is_mapped(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, limit_bytes=2000)
    with cache.open("a", 1000, writes(b"a" * 1000)) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for age, name in ((30, "a"), (20, "b")):
        cache.open(name, 1000, writes(name.encode() * 1000)).close()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    cache.open("a", 1000, never).close()  # used again: b is the oldest now
    cache.open("c", 1000, writes(b"c" * 1000)).close()
    assert names(cache) == {"a", "c"}
    os.utime(tmp_path / "a", (0, 0))
    cache.open("d", 0, writes(b"d" * 1000)).close()  # also when the size is known only afterwards
    assert names(cache) == {"c", "d"}
    assert mapped[:] == b"a" * 1000


def test_a_file_above_the_limit_is_had_all_the_same(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, limit_bytes=10)
    for name in "ab":
        with cache.open(name, 100, writes(b"x" * 100)) as file:
            assert len(file.read()) == 100
    assert names(cache) == {"b"}


def test_without_a_limit_the_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path)
    cache.open("a", 100, writes(b"x" * 100)).close()
    usage = room.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage._replace(free=500))
    cache.open("b", 100, writes(b"x" * 100)).close()
    assert names(cache) == {"b"}
    with pytest.raises(DataError, match=r"has 0\.0 GB free, the next shard needs 0\.0 GB; free some"):
        cache.open("c", 1000, never)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=f"data.cache {tmp_path}/file/cache cannot be used"):
        make_cache(tmp_path / "file/cache").open("a", 1, never)


def test_leftovers_of_the_day_before_go_and_those_in_use_stay(tmp_path: Path) -> None:
    for name in ("old.part", "used.part", "new.part", "old.failed", "whole"):
        (tmp_path / name).write_bytes(b"half")
        if name != "new.part":
            os.utime(tmp_path / name, (0, 0))
    with (tmp_path / "used.part").open("rb") as used:
        fcntl.flock(used, fcntl.LOCK_EX)
        make_cache(tmp_path).remove_leftovers()
    assert names(make_cache(tmp_path)) == {"used.part", "new.part", "whole"}
    make_cache(tmp_path / "nowhere").remove_leftovers()


def test_those_who_wait_fail_as_the_one_who_tried(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    trying, waits, tries = threading.Event(), threading.Event(), []
    real = fcntl.flock

    def flock(file: Any, how: int) -> None:
        if how == fcntl.LOCK_EX:
            waits.set()
        real(file, how)

    def fails(part: IO[bytes]) -> None:
        tries.append(1)
        waits.clear()  # it was set by the lock on the room
        trying.set()
        assert waits.wait(20)
        raise DataError("no such luck")

    errors: list[str] = []

    def ask() -> None:
        try:
            cache.open("a", 1, fails)
        except DataError as error:
            errors.append(str(error))

    caching.fcntl.flock = flock
    try:
        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        assert trying.wait(20)
        threads[1].start()
        for thread in threads:
            thread.join()
    finally:
        caching.fcntl.flock = real
    assert (errors, len(tries)) == (["no such luck"] * 2, 1)
    cache.open("a", 1, writes(b"x")).close()  # whoever asks later tries anew
    assert names(cache) == {"a"}


def _fill_half(folder: Path, pipe: Any) -> None:
    def fill(part: IO[bytes]) -> None:
        part.write(b"half")
        part.flush()
        pipe.send("half")
        pipe.recv()

    make_cache(folder).open("a", 8, fill)


def test_a_killed_process_leaves_nothing_that_could_be_taken_for_the_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_fill_half, args=(tmp_path, theirs))
    process.start()
    assert ours.recv() == "half"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert names(make_cache(tmp_path)) == {"a.part"}

    def go_on(part: IO[bytes]) -> None:
        assert part.read() == b"half"
        part.write(b"more")

    with make_cache(tmp_path).open("a", 8, go_on) as file:
        assert file.read() == b"halfmore"
    assert names(make_cache(tmp_path)) == {"a"}


def _ask(folder: Path, barrier: Any, count: Any) -> None:
    def fill(part: IO[bytes]) -> None:
        with count.get_lock():
            count.value += 1
        part.write(b"x" * 1000)

    barrier.wait()
    for name in range(20):
        make_cache(folder, limit_bytes=100_000).open(str(name), 1000, fill).close()


def test_processes_never_fill_the_same_file_twice(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, count = context.Barrier(4), context.Value("i", 0)
    processes = [context.Process(target=_ask, args=(tmp_path, barrier, count)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert count.value == 20
    assert len(names(make_cache(tmp_path))) == 20


def test_a_folder_with_anything_else_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"precious")
    for cache in (Cache(tmp_path), make_cache(tmp_path, limit_bytes=1)):
        with pytest.raises(
            DataError, match=f"files in {tmp_path}, which contains 'train-000000.tar', not a file of the cache, which deletes"
        ):
            cache.open("0" * 64 + ".tar" if cache._own is room.OWN else "a", 1, never)
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


def test_what_others_put_into_the_cache_later_stays(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", limit_bytes=1500)
    cache.open("a", 1000, writes(b"a" * 1000)).close()
    others = ["train-000000.tar", "manifest.json", "half.tar.part", "x-1.failed", ".x-1.room"]
    for name in others:
        (cache.folder / name).write_bytes(b"x" * 9000)
        os.utime(cache.folder / name, (0, 0))
    cache.remove_leftovers()
    cache.open("b", 1000, writes(b"b" * 1000)).close()  # a goes; the others count for nothing
    assert {path.name for path in cache.folder.iterdir()} == {"b", MARKER, ".room.lock", *others}


def test_a_cache_of_an_earlier_version_is_taken_over(tmp_path: Path) -> None:
    name = f"plain-{'0' * 64}.json"
    (tmp_path / name).write_bytes(b"{}")
    (tmp_path / ".room.lock").write_bytes(b"")
    with Cache(tmp_path).open(name, 2, never) as file:
        assert file.read() == b"{}"
    assert (tmp_path / MARKER).is_file()
