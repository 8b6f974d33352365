"""One process at a time: refused while the holder lives, taken over when it is dead, and noticed by a holder that slept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from clae_dist import lease
from clae_dist.errors import FAILED
from clae_dist.lease import hold, refuse_if_held
from tests.processes import Process, started

HOLDS = """
import sys
from pathlib import Path
from clae_dist import lease

path, machine, lease.BEAT_S = Path(sys.argv[1]), sys.argv[2], 0.1
if machine:
    lease._machine = lambda: machine
with lease.hold(path, "clae train", SystemExit, ""):
    print("holds", flush=True)
    sys.stdin.read()
"""


class InUse(Exception):
    pass


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr(lease, "EXPIRY_S", 1.5)
    monkeypatch.setattr(lease, "_POLL_S", 0.02)


@contextmanager
def holder(path: Path, machine: str = "") -> Iterator[Process]:
    """Another process that holds the lease; as if on another machine, if one is named."""
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(sys.executable, "-c", HOLDS, path, machine, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        yield process


def mine(path: Path, say: lease.Say = print) -> AbstractContextManager[None]:
    return hold(path, "clae train", InUse, "wait for it.", wait_s=0.2, say=say)


@pytest.mark.parametrize("machine", [pytest.param("", marks=pytest.mark.slow), "another"])
def test_the_second_is_refused_with_host_process_and_since_when(machine: str, tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    with holder(path, machine) as other:
        who = rf"{tmp_path} is in use by clae train on host {os.uname().nodename}, process {other.pid}, since \d{{4}}-.*; wait"
        with pytest.raises(InUse, match=who), mine(path):
            pytest.fail("two hold it")
        with pytest.raises(InUse, match=who):
            refuse_if_held(path, InUse, "wait for it.", say=lambda text: None)
    assert path.exists()


def test_a_lease_is_gone_with_its_holder(tmp_path: Path) -> None:
    with mine(tmp_path / "a.lease"):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_was_killed_on_this_machine_has_lost_it_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    with holder(path) as other:
        other.kill()
        other.wait()
    left = path.read_bytes()
    with mine(path, say=pytest.fail):
        pass
    path.write_bytes(left)
    refuse_if_held(path, InUse, "", say=pytest.fail)
    assert not path.exists()


def test_the_process_id_of_a_dead_holder_may_be_anothers_by_now(tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    with mine(path):
        ours = json.loads(path.read_bytes())
    path.write_text(json.dumps({**ours, "started": ours["started"] - 1, "id": "another"}))
    with mine(path, say=pytest.fail):
        pass


def test_a_holder_of_another_machine_is_given_up_when_it_shows_no_sign_of_life(tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    said: list[str] = []
    with holder(path, "another") as other:
        other.kill()
        other.wait()
        begun = time.monotonic()
        with mine(path, say=said.append):
            assert time.monotonic() - begun >= lease.EXPIRY_S
    assert f"process {other.pid}" in said[0]
    assert "waiting 1.5 s for a sign of life" in said[0]
    assert "is free now" in said[1]


def test_a_holder_that_slept_too_long_ends_and_says_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    with holder(path, "another") as other:
        other.send_signal(signal.SIGSTOP)
        with mine(path):
            other.send_signal(signal.SIGCONT)
            assert other.wait(10) == FAILED
            assert other.stderr is not None
            said = other.stderr.read()
            assert f"{path} expired" in said
            assert f"process {os.getpid()}" in said
            assert json.loads(path.read_bytes())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"beats": 1, "pid": "x"}', b"\xff" * 2000, None])
def test_a_file_that_names_nobody_is_watched_like_a_lease(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EXPIRY_S", 0.5)  # nobody beats here
    path = tmp_path / "a.lease"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    begun = time.monotonic()
    with mine(path):
        assert time.monotonic() - begun >= lease.EXPIRY_S
        assert json.loads(path.read_bytes())["pid"] == os.getpid()


def test_one_of_many_takes_a_stale_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them have seen that it is stale before the first takes it."""
    path = tmp_path / "a.lease"
    with holder(path) as other:
        other.kill()
        other.wait()
    ready, enough, count = threading.Barrier(6), threading.Event(), threading.Semaphore(0)
    results: list[str] = []

    first, judge = threading.local(), lease._wait_until_free

    def judged(*arguments: Any) -> bytes:
        content = judge(*arguments)
        if not getattr(first, "over", False):
            first.over = True
            ready.wait()
        return content

    monkeypatch.setattr(lease, "_wait_until_free", judged)
    monkeypatch.setattr(lease, "_lose", lambda path, holder: results.append("lost"))  # would end this process

    def contend() -> None:
        try:
            with mine(path, say=lambda text: None):
                results.append("holds")
                enough.wait(15)
        except InUse:
            results.append("refused")
            count.release()

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert count.acquire(timeout=10), results
    enough.set()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["holds"] + ["refused"] * 5


def test_a_lease_that_was_deleted_by_hand_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    with mine(path):
        path.unlink()
        deadline = time.monotonic() + 10
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(InUse), mine(path):
            pytest.fail("two hold it")
