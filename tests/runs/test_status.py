"""`clae status` and ends.jsonl: states, clocks that are off, damaged files, and the exit code for scripts."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from clae_dist.cli import main
from clae_dist.errors import FAILED, HUNG, MEMORY, OK, STOPPED, ConfigError
from clae_dist.lease import Holder, hold
from clae_dist.runs.ends import MAX_TEXT, Attempt, End, host_at_fault, read_ends, record_end, repeated_crash
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.heartbeat import Heartbeat, read_heartbeat, write_heartbeat
from clae_dist.runs.status import RunStatus, status_of
from tests.runs.test_listing import write_run


def beat(**changes: object) -> Heartbeat:
    now = time.time()
    usual = Heartbeat(now, now - 90, 17, 100, "training", 0.5, 300.0, 4, "node-1", 7, ["node-1", "node-2"], {"loss": 2.5})
    return replace(usual, **changes)  # type: ignore[arg-type]


def end(**changes: object) -> End:
    usual = End(1.0, 2.0, "code", 1, 4, "node-2", 17, 1, "KeyError", "digest", 8)
    return replace(usual, **changes)  # type: ignore[arg-type]


def lease(folder: RunFolder) -> None:
    """That of a process on another machine."""
    about = Holder("x", "clae train", "node-1", "another", 1, 1, 1.0)
    folder.training_lease.write_text(json.dumps({**vars(about), "beats": 1}))


def never(_: float) -> None:
    pytest.fail("the clocks agree: there is nothing to wait for")


def status(folder: RunFolder) -> RunStatus:
    return status_of(folder.path, sleep=never)


def test_alive_slow_and_hung_on_another_machine(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    assert (status(folder).state, status(folder).exit_code) == ("new", OK)
    lease(folder)
    write_heartbeat(folder.path, beat())
    assert (status(folder).state, status(folder).exit_code, status(folder).notes) == ("alive", OK, ())
    write_heartbeat(folder.path, beat(slow="rank 3 on node-2: decode"))
    assert (status(folder).state, status(folder).exit_code) == ("slow", OK)
    write_heartbeat(folder.path, beat(quiet_s=170.0))
    assert (status(folder).state, status(folder).exit_code) == ("hung", HUNG)
    assert status(folder).since == pytest.approx(time.time() - 170, abs=5)
    write_heartbeat(folder.path, beat(quiet_s=170.0, limit_s=1200.0))  # while it saves
    assert status(folder).state == "alive"


def test_a_heartbeat_that_stopped(tmp_path: Path) -> None:
    """Of another machine's run: dead. If the process is there (stopped by a debugger, say), the run hangs."""
    folder = write_run(tmp_path / "run", steps=4)
    lease(folder)
    long_ago = time.time() - 100
    write_heartbeat(folder.path, beat(time=long_ago))
    os.utime(folder.heartbeat_file, (long_ago, long_ago))
    assert (status(folder).state, status(folder).exit_code) == ("dead", FAILED)
    assert status(folder).since == pytest.approx(long_ago, abs=0.01)
    folder.training_lease.unlink()
    with hold(folder.training_lease, "clae train", ConfigError, "wait."):
        assert (status(folder).state, status(folder).exit_code) == ("hung", HUNG)


@pytest.mark.parametrize("beats", [True, False])
@pytest.mark.parametrize(("ahead_s", "note"), [(3600.0, "from the future"), (-3600.0, "ahead of that of the storage")])
def test_a_clock_that_is_off_is_named_and_not_believed(ahead_s: float, note: str, beats: bool, tmp_path: Path) -> None:
    """The storage's clock is an hour off: it makes a dead run look alive, or one that lives look dead."""
    folder = write_run(tmp_path / "run", steps=4)
    lease(folder)
    write_heartbeat(folder.path, beat(time=time.time() + max(0.0, ahead_s)))
    os.utime(folder.heartbeat_file, (time.time() + ahead_s,) * 2)
    watched: list[float] = []

    def sleep(seconds: float) -> None:
        watched.append(seconds)
        if beats:
            write_heartbeat(folder.path, beat(time=time.time() + max(0.0, ahead_s), step=18))
            os.utime(folder.heartbeat_file, (time.time() + ahead_s,) * 2)

    found = status_of(folder.path, sleep)
    assert len(watched) == 1
    assert found.state == ("alive" if beats else "dead")
    assert any(note in line for line in found.notes), found.notes


def test_a_run_that_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    write_heartbeat(folder.path, beat(start=10.0))
    for cause, code, state, expected in (
        ("memory", MEMORY, "failed", MEMORY),
        ("preemption", STOPPED, "stopped", STOPPED),
        ("finished", OK, "finished", OK),
    ):
        record_end(folder.path, end(start=10.0 + expected, cause=cause, code=code, text="the \x1b[2J cause"))
        assert (status(folder).state, status(folder).exit_code) == (state, expected)
        assert main(["status", str(folder.path)]) == expected
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{state} since ")
        assert "\x1b" not in "".join(lines)
        assert main(["status", str(folder.path), "--json"]) == expected
        assert json.loads(capsys.readouterr().out)["end"]["cause"] == cause
        os.unlink(folder.ends_file)
    assert main(["status", str(tmp_path)]) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\n", b'{"time": 1}\n', b'{"step": -1, "time": NaN}\n', b"[1]\n" * 9])
def test_damaged_files_are_no_heartbeat_and_no_end(content: bytes, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    folder.heartbeat_file.write_bytes(content)
    folder.ends_file.write_bytes(content)
    assert read_heartbeat(folder.path) is None
    said: list[str] = []
    assert read_ends(folder.path, said.append) == []
    assert len(said) == bool(content)
    record_end(folder.path, end())
    assert read_ends(folder.path) == [end()]
    folder.heartbeat_file.unlink()
    os.mkfifo(folder.heartbeat_file)
    assert read_heartbeat(folder.path) is None


def test_the_rank_at_fault_is_the_end_of_a_start(tmp_path: Path) -> None:
    lost = end(cause="network", rank=0, time=1.0, text="Connection closed by peer [10.0.0.2]:1", digest="other")
    folder = write_run(tmp_path / "run")
    record_end(folder.path, lost)
    (vanished,) = read_ends(folder.path)  # no rank says that it left
    assert (vanished.cause, vanished.host) == ("host", "")
    for number in range(100):
        record_end(folder.path, replace(lost, rank=number, time=3.0))
    record_end(folder.path, end())
    record_end(folder.path, end(start=5.0, cause="network", text="timed out waiting for rank 3"))
    assert [one.cause for one in read_ends(folder.path)] == ["code", "network"]
    assert len(folder.ends_file.read_text().splitlines()) < 10  # a thousand ranks lose a connection at once


def test_text_is_one_line_without_logins(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    Attempt(1.0, 3).end(folder.path, 0, 1, "code", 1, "GET https://me:canary@host/a failed\n" + "x" * 2000)
    (line,) = folder.ends_file.read_text().splitlines()
    assert "canary" not in line
    assert len(json.loads(line)["text"]) <= MAX_TEXT + 1
    Attempt().end(tmp_path / "none", 0, 1, "code", 1, "no folder")  # as on a disk that is gone: nothing is raised


def test_which_two_ends_are_the_same_crash() -> None:
    first, again = end(), end(start=3.0, rank=2)
    assert repeated_crash([end(digest="x"), first, again]) == again
    for other in (end(digest="x"), end(checkpoint=9), end(cause="network"), end(digest="")):
        assert repeated_crash([first, other]) is None
        assert repeated_crash([other, first]) is None
    assert repeated_crash([first, again, end(cause="preemption", digest="")]) is None
    assert repeated_crash([first]) is None
    lost = end(cause="network", digest="d")
    assert repeated_crash([lost, lost]) is None


def test_which_host_is_at_fault() -> None:
    first, again = end(cause="host"), end(cause="no progress", start=3.0)
    assert host_at_fault([first, again]) == "node-2"
    for other in (end(cause="host", host="node-1"), end(cause="host", checkpoint=9), end(cause="code"), end(cause="stopped")):
        assert host_at_fault([first, other]) == ""
    unknown = end(cause="host", host="")
    assert host_at_fault([unknown, unknown]) == ""
    assert host_at_fault([first]) == ""
