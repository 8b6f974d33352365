"""Ends of all nodes of a run in a bucket, and `clae status` by URL."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from clae_dist.cli import main
from clae_dist.commands import status as command
from clae_dist.errors import FAILED, HUNG, OK
from clae_dist.launchers import exclusion
from clae_dist.lease import Holder
from clae_dist.runs.ends import Attempt, End, read_ends
from clae_dist.runs.exclusion import excluded_hosts
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.heartbeat import write_heartbeat
from clae_dist.runs.mirror import fetch_ends, mirrored
from clae_dist.runs.record import Record
from clae_dist.staging import copy_folder, staging_folder
from clae_dist.world import World
from tests.checkpoints import tensors, write_checkpoint
from tests.object_server import ON_BOTH, ObjectServer
from tests.runs.test_listing import write_run
from tests.runs.test_status import beat


class Nodes:
    """Caches of machines of their own; each has a staging folder of the run."""

    def __init__(self, url: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url, self._base, self._monkeypatch = url, base, monkeypatch

    def __call__(self, name: str) -> Path:
        """From here on, this process is on that machine. Its staging folder."""
        self._monkeypatch.setenv("CLAE_CACHE", str(self._base / name))
        return staging_folder(self.url)


@pytest.fixture
def nodes(bucket: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """The run begins on node-0."""
    made = Nodes(bucket.url, tmp_path, monkeypatch)
    record = Record.of(write_run(made("node-0")).path)
    assert record is not None
    record.push()
    return made


def fail(folder: Path, start: float, rank: int, host: str, cause: Any = "memory") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Attempt(start, 7).end(folder, rank, 2, cause, 7, "out of memory", f"digest {start}", host=host)


@ON_BOTH
def test_every_node_has_the_ends_of_all(nodes: Nodes, bucket: ObjectServer) -> None:
    """The rank at fault reports on its own node; rank 0's reads it before the next start, and sends it with its own file."""
    fail(nodes("node-1"), 10.0, 1, "node-1")
    fail(nodes("node-0"), 10.0, 0, "node-0", "network")
    fail(nodes("node-1"), 20.0, 1, "node-1")
    here = nodes("node-0")
    fetch_ends(here)
    expected = [(10.0, "memory", "node-1"), (20.0, "memory", "node-1")]
    assert [(end.start, end.cause, end.host) for end in read_ends(here)] == expected
    assert list(excluded_hosts(here)) == ["node-1"]
    with mirrored(here, World.single("cpu"), pytest.fail) as mirror:
        mirror.share()
        assert [name for name in bucket.names() if "/ends/" in name] == []
    for name in ("node-0", "node-2"):
        fetch_ends(nodes(name))
        assert [(end.start, end.cause, end.host) for end in read_ends(staging_folder(nodes.url))] == expected
    fail(nodes("node-2"), 5.0, 1, "node-2")  # a late report of an older start
    fetch_ends(nodes("node-0"))
    assert [end.start for end in read_ends(here)] == [5.0, 10.0, 20.0]


def test_without_the_store_the_ends_of_this_node_count(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    here = nodes("node-0")
    monkeypatch.setattr(Record, "pull_ends", lambda self: (_ for _ in ()).throw(OSError("no route to host")))
    monkeypatch.setattr(Record, "put_end", lambda self, line: (_ for _ in ()).throw(OSError("no route to host")))
    fail(here, 10.0, 0, "node-0")
    fetch_ends(here)
    assert [end.host for end in read_ends(here)] == ["node-0"]


def test_a_host_is_readmitted_by_url(nodes: Nodes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CLAE_NODES", "2:3")
    monkeypatch.setattr(exclusion.platform, "node", lambda: "node-1")
    for start in (10.0, 20.0):
        fail(nodes("node-1"), start, 1, "node-1")
    join = ["join", "quickstart", f"run_dir={nodes.url}"]
    assert exclusion.main(join) == FAILED
    nodes("laptop")
    main(["status", nodes.url])
    assert "exclude this host: node-1 ended two starts" in capsys.readouterr().out
    main(["status", nodes.url, "--readmit", "node-1"])
    assert "exclude this host" not in capsys.readouterr().out
    nodes("node-1")
    assert exclusion.main(join) == OK


@ON_BOTH
def test_status_by_url(nodes: Nodes, bucket: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alive by the heartbeat's age in the store, hung, then dead when it does not change, and ended."""
    here = RunFolder(nodes("node-0"))
    about = Holder("x", "clae train", "node-0", "another", 1, 1, 1.0)
    bucket.write("runs/first/training.lease", json.dumps({**vars(about), "beats": 1}).encode())
    write_checkpoint(here.path, 4, tensors(4))
    record = Record.of(here.path)
    assert record is not None

    def state(**changes: object) -> tuple[str, int, int | None]:
        write_heartbeat(here.path, beat(**changes))
        record.push()
        shutil.rmtree(copy_folder(nodes.url), ignore_errors=True)
        return read()

    def read() -> tuple[str, int, int | None]:
        with monkeypatch.context() as patch:
            said: list[str] = []
            patch.setattr("builtins.print", said.append)
            code = main(["status", nodes.url, "--json"])
        found = json.loads("".join(said))
        return found["state"], code, found["checkpoint"]

    assert state() == ("alive", OK, 4)
    assert state(quiet_s=200.0) == ("hung", HUNG, 4)
    monkeypatch.setattr(command.time, "sleep", lambda seconds: None)  # the clock of node-0 is an hour ahead: it is watched
    assert state(time=time.time() + 3600) == ("dead", FAILED, 4)
    fail(here.path, time.time(), 0, "node-0")
    assert read() == ("failed", 7, 4)


def test_an_end_is_text_of_one_line(nodes: Nodes, bucket: ObjectServer) -> None:
    here = nodes("node-1")
    here.mkdir(parents=True)
    Attempt(1.0).end(here, 0, 1, "code", 1, "GET https://me:canary@host/a failed\nagain", host="node-1")
    (name,) = (name for name in bucket.names() if "/ends/" in name)
    content = json.loads(bucket.read(name))
    assert "canary" not in content["text"]
    assert "\n" not in content["text"]
    assert set(content) == set(End.__dataclass_fields__)
