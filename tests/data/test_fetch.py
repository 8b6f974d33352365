"""Fetching from a server that stalls, cuts, lies and is away: time is lost, never a byte."""

from __future__ import annotations

import hashlib
import io
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from clae_dist.data import fetch as fetching
from clae_dist.data.fetch import Patience, Stopped, digest_check, fetch
from clae_dist.errors import DataError
from tests.http_faults import Fault, FaultyServer, serve

DATA = bytes(range(256)) * 400
SHA256 = hashlib.sha256(DATA).hexdigest()
PATIENCE = Patience(retries=3, timeout_s=0.3)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(fetching, "_FIRST_PAUSE_S", 0.001)
    (tmp_path / "served").mkdir()
    (tmp_path / "served/shard.tar").write_bytes(DATA)
    with serve(tmp_path / "served") as running:
        yield running


def fetched(url: str, held: bytes = b"", num_bytes: int = len(DATA), patience: Patience = PATIENCE) -> bytes:
    target = io.BytesIO(held)
    fetch(url, target, "shard.tar", patience, digest_check(num_bytes, SHA256), num_bytes)
    return target.getvalue()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "faults",
    [
        [],
        [Fault("stall", 1000)],
        [Fault("cut", 50_000), Fault("cut", 10)],
        [Fault("cut", 50_000), Fault("no_range")],
        [Fault("cut", 0)] * 3,
        [Fault("wrong")],
        [Fault("short", 3000)],
        [Fault("no_length", 777)],
        [Fault("status", code=500), Fault("status", code=503), Fault("status", code=429)],
        [Fault("drip", 5000)],
        [Fault("stall", 60_000), Fault("wrong"), Fault("status", code=502), Fault("cut", 5)],
    ],
    ids=lambda faults: "-".join(fault.kind for fault in faults) or "none",
)
def test_faults_cost_time_and_never_a_byte(server: FaultyServer, faults: list[Fault], known: bool) -> None:
    server.faults["shard.tar"] = list(faults)
    assert fetched(server.url + "/shard.tar", num_bytes=len(DATA) if known else 0) == DATA
    assert not server.faults["shard.tar"], "not every fault was met"


def test_a_cut_connection_goes_on_where_it_was(server: FaultyServer) -> None:
    server.faults["shard.tar"] = [Fault("cut", 50_000), Fault("cut", 40_000)]
    assert fetched(server.url + "/shard.tar") == DATA
    assert server.ranges == [("shard.tar", "bytes=50000-"), ("shard.tar", "bytes=90000-")]


def test_a_server_that_knows_no_ranges_sends_the_whole_file_once_more(server: FaultyServer) -> None:
    server.faults["shard.tar"] = [Fault("cut", 50_000), Fault("no_range")]
    assert fetched(server.url + "/shard.tar") == DATA
    assert server.requests["shard.tar"] == 2


def test_progress_is_not_counted_against_the_retries(server: FaultyServer) -> None:
    server.choose = lambda _, number: Fault("cut", 10_000)
    assert fetched(server.url + "/shard.tar") == DATA
    assert server.requests["shard.tar"] == 11


def test_bytes_that_a_killed_process_left_are_kept_if_they_fit(server: FaultyServer) -> None:
    assert fetched(server.url + "/shard.tar", held=DATA[:70_000]) == DATA
    assert server.ranges == [("shard.tar", "bytes=70000-")]
    assert fetched(server.url + "/shard.tar", held=bytes(70_000)) == DATA  # a checksum tells
    assert fetched(server.url + "/shard.tar", held=DATA + b"more") == DATA


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("stall", 0), r"in 4 tries: no bytes for 0\.3 s"),
        (Fault("wrong"), rf"in 4 tries: sha256 [0-9a-f]{{64}}, expected {SHA256}"),
        (Fault("status", code=503), "in 4 tries: the server answered 503"),
        (Fault("short", 3000), r"in 4 tries: 3000 bytes, expected 102400"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_what_does_not_pass_is_named(server: FaultyServer, fault: Fault, reason: str) -> None:
    server.choose = lambda *_: fault
    with pytest.raises(DataError, match=f"shard.tar could not be fetched from {server.url}/shard.tar {reason}"):
        fetched(server.url + "/shard.tar")


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_what_no_try_can_mend_is_asked_for_once(server: FaultyServer, code: int) -> None:
    server.choose = lambda *_: Fault("status", code=code)
    with pytest.raises(DataError, match=f"the server answered {code}"):
        fetched(server.url + "/shard.tar")
    assert server.requests["shard.tar"] == 1


def test_a_servers_wish_to_wait_is_respected(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0.0)
            return False

    server.faults["shard.tar"] = [Fault("status", code=503, after=7), Fault("status", code=503, after=9999)]
    target = io.BytesIO()
    fetch(server.url + "/shard.tar", target, "shard.tar", PATIENCE, digest_check(0, SHA256), stop=Stop())
    assert pauses == [7.0, 60.0]
    assert target.getvalue() == DATA


def test_a_fetch_that_nobody_waits_for_ends(server: FaultyServer) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        fetch(server.url + "/shard.tar", io.BytesIO(), "shard.tar", PATIENCE, digest_check(0, SHA256), stop=stop)


def test_logins_reach_the_server_and_no_message(server: FaultyServer) -> None:
    secret = server.url.replace("://", "://me:pa%2Fss@") + "/shard.tar?signature=tok3n"
    assert fetched(secret) == DATA
    assert server.logins == ["Basic bWU6cGEvc3M="]
    server.choose = lambda *_: Fault("status", code=403)
    with pytest.raises(DataError) as caught:
        fetched(secret)
    assert not {"pa%2Fss", "pa/ss", "tok3n"} & set(str(caught.value).replace("?", " ").replace("=", " ").split())
    assert "tok3n" not in str(caught.value)
    assert f"{server.url}/shard.tar?…" in str(caught.value)


def test_a_url_that_is_none_is_not_shown_either(server: FaultyServer) -> None:
    with pytest.raises(DataError, match=r"/shard\.tar\?…: the URL has invalid characters") as caught:
        fetched(f"{server.url}/shard.tar?signature=tok3n and more")
    assert "tok3n" not in str(caught.value)


def test_a_pipe_is_read_and_its_failure_seen(tmp_path: Path, server: FaultyServer) -> None:
    (tmp_path / "plain").write_bytes(DATA)
    assert fetched(f"pipe:cat {shlex.quote(str(tmp_path / 'plain'))}") == DATA
    with pytest.raises(DataError, match="fetched from pipe:head … in .* 1000 bytes, expected 102400|ended after 1000"):
        fetched(f"pipe:head -c 1000 {shlex.quote(str(tmp_path / 'plain'))}")
    with pytest.raises(DataError, match="in 4 tries: the command ended with status 3"):
        fetched("pipe:exit 3", num_bytes=0)


def test_a_pipe_that_stalls_is_ended_with_all_its_processes(tmp_path: Path, server: FaultyServer) -> None:
    alive = tmp_path / "pid"
    command = f"echo $$ > {alive}; {sys.executable} -c 'import time; time.sleep(600)' | cat"
    with pytest.raises(DataError, match=r"in 1 tries|no bytes for 0\.3 s"):
        fetched("pipe:" + command, num_bytes=0, patience=Patience(retries=0, timeout_s=0.3))
    assert not Path(f"/proc/{alive.read_text().strip()}").exists()


class Moody(MemoryFileSystem):
    """A store whose reads fail as often as `failures` says; `stalls` of them until `over`."""

    protocol = "moody"
    failures = 0
    over = threading.Event()
    stalls = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("moody://", "memory://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if Moody.failures:
            Moody.failures -= 1
            raise ConnectionError(f"moody://key:secret@bucket{path}?token=tok3n is away")
        if Moody.stalls:
            Moody.stalls -= 1
            Moody.over.wait()
        return super()._open(path, mode, **options)


def test_any_store_that_fsspec_knows(server: FaultyServer) -> None:
    fsspec.register_implementation("moody", Moody, clobber=True)
    Moody().pipe("/bucket/shard.tar", DATA)
    Moody.failures, Moody.stalls = 2, 1
    try:
        assert fetched("moody://bucket/shard.tar") == DATA
        assert fetched("moody://bucket/shard.tar", held=DATA[:99_999]) == DATA
        Moody.failures = 99
        with pytest.raises(DataError, match=r"in 4 tries: moody://bucket/bucket/shard\.tar\?… is away"):
            fetched("moody://bucket/shard.tar")
        Moody.failures = 0
        with pytest.raises(DataError, match="no.tar could not be fetched from moody://bucket/no.tar: it does not exist"):
            fetch("moody://bucket/no.tar", io.BytesIO(), "no.tar", PATIENCE, digest_check(0, SHA256))
    finally:
        Moody.failures = 0
        Moody.over.set()


def test_a_store_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r"s3:// URLs, which need a package that is not installed; pip install s3fs"):
        fetched("s3://bucket/shard.tar")
    with pytest.raises(DataError, match="nosuch:// URLs, which fsspec cannot open"):
        fetched("nosuch://bucket/shard.tar")
