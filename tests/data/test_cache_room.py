"""The room of the cache: fetches of many processes stay within the limit together, and wait for each other."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import IO, Any

import pytest

from clae_dist.data import cache as caching
from clae_dist.data import room
from clae_dist.errors import DataError
from tests.data.test_cache import make_cache, names, writes


def _fetch_slowly(folder: Path, name: str, limit: int, known: bool, most: Any) -> None:
    """Fills NAME in ten writes; `most` is the largest sum of files that was seen while doing so."""

    def fill(part: IO[bytes]) -> None:
        for _ in range(10):
            part.write(b"x" * 100)
            part.flush()
            there = 0
            for path in folder.glob("[!.]*"):
                with contextlib.suppress(FileNotFoundError):
                    there += path.stat().st_blocks and path.stat().st_size
            with most.get_lock():
                most.value = max(most.value, there)

    make_cache(folder, limit_bytes=limit).open(name, 1000 if known else 0, fill).close()


@pytest.mark.parametrize("known", [True, False])
def test_fetches_of_many_processes_stay_within_the_limit_together(tmp_path: Path, known: bool) -> None:
    """Each of them had found room for itself, for the same bytes."""
    context = multiprocessing.get_context("spawn")
    most = context.Value("q", 0)
    (tmp_path / "old.part").write_bytes(b"x" * 900)  # nobody fills it
    limit = 2500 if known else 3500
    processes = [context.Process(target=_fetch_slowly, args=(tmp_path, str(n), limit, known, most)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert 1000 <= most.value <= limit
    assert {path.suffix for path in tmp_path.glob("[!.]*")} == {""}
    assert sum(path.stat().st_size for path in tmp_path.glob("[!.]*")) <= limit


def test_a_fetch_waits_for_the_room_of_another_and_not_for_one_that_died(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, limit_bytes=1500)
    begun, go_on, order = threading.Event(), threading.Event(), []

    def slow(part: IO[bytes]) -> None:
        begun.set()
        assert go_on.wait(20)
        part.write(b"x" * 1000)
        order.append("a")

    def quick(part: IO[bytes]) -> None:
        part.write(b"x" * 1000)
        order.append("b")

    (tmp_path / "dead.part").write_bytes(b"")
    with (tmp_path / ".dead.room").open("wb") as file:
        file.truncate(1400)
    first = threading.Thread(target=lambda: cache.open("a", 1000, slow).close())
    first.start()
    assert begun.wait(20)
    second = threading.Thread(target=lambda: cache.open("b", 1000, quick).close())
    second.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "b.part").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    go_on.set()
    first.join()
    second.join()
    assert order == ["a", "b"]
    assert names(cache) - {"dead.part"} == {"b"}


def test_a_file_that_is_evicted_as_soon_as_it_is_whole_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fetched = os.replace, []

    def evicted(part: Path, path: Path) -> None:
        real(part, path)
        if len(fetched) == 1:
            path.unlink()

    def fill(part: IO[bytes]) -> None:
        fetched.append(1)
        part.write(b"x" * 1000)

    monkeypatch.setattr(caching.os, "replace", evicted)
    with make_cache(tmp_path, limit_bytes=1500).open("a", 1000, fill) as file:
        assert file.read() == b"x" * 1000
    assert fetched == [1]


def test_a_part_that_becomes_whole_while_it_is_counted_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = tmp_path / "a.part"
    part.write_bytes(b"x" * 1000)
    real = room._is_locked

    def meanwhile(path: Path) -> bool:
        if part.exists():
            part.rename(tmp_path / "a")
        return real(path)

    monkeypatch.setattr(room, "_is_locked", meanwhile)
    make_cache(tmp_path, limit_bytes=1500).open("b", 1000, writes(b"x" * 1000)).close()
    assert names(make_cache(tmp_path)) == {"b"}


def test_a_link_to_nothing_ends_the_counting(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot be listed"):
        make_cache(tmp_path, limit_bytes=1500).open("b", 1000, writes(b"x"))


def test_a_disk_that_fills_up_under_a_fetch_of_unknown_size_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = room.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage._replace(free=500))

    def fill(part: IO[bytes]) -> None:
        for _ in range(10):
            part.write(b"x" * 400)

    with pytest.raises(DataError, match="GB free, too little for a shard of unknown size"):
        make_cache(tmp_path).open("a", 0, fill)
