"""The decision to exclude a host, by rank 0 for all ranks and by a host that wants to join."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clae_dist.cli import main
from clae_dist.config import Config
from clae_dist.launchers import exclusion
from clae_dist.launchers.exclusion import _Place, decide
from clae_dist.runs.ends import Attempt, read_ends, record_end
from clae_dist.runs.exclusion import excluded_hosts
from clae_dist.runs.heartbeat import write_heartbeat
from tests.runs.test_listing import write_run
from tests.runs.test_status import beat, end

HOSTS = ("head", "node-1", "node-2")
PLACES = [_Place(host, "", host == "head") for host in HOSTS for _ in range(2)]


def fail(folder: Path, *hosts: str) -> None:
    """Each of `hosts` ends two starts."""
    count = len(read_ends(folder))
    for number, name in enumerate(name for name in hosts for _ in range(2)):
        record_end(folder, end(start=float(count + number), host=name, cause="host", text="uncorrectable ECC error"))


@pytest.mark.parametrize(
    ("variable", "failed", "leaving", "text"),
    [
        ("2:3", ["node-1"], ("node-1",), "--readmit node-1` uses it again"),
        ("2:4", ["node-1", "node-2"], ("node-2",), "excluding node-2"),  # two must stay
        ("1:3", ["node-1", "node-2"], ("node-1", "node-2"), "excluding node-1, node-2"),
        ("2:3", ["head"], (), "start the run on the other hosts, with another --head"),
        ("3:4", ["node-1"], (), "--nodes is 3:4, and 3 hosts are here; start another host instead of node-1"),
        ("3", ["node-1"], (), "all 3 hosts are needed; start another instead of node-1 (Slurm: sbatch --exclude=node-1)"),
        ("2:3", ["node-9"], None, ""),  # not in this start
        ("2:3", [], None, ""),
    ],
)
def test_as_many_hosts_as_the_run_can_do_without_are_excluded(
    variable: str,
    failed: list[str],
    leaving: tuple[str, ...] | None,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLAE_NODES", variable)
    fail(tmp_path, *failed)
    found = decide(Config(run_dir=str(tmp_path)), PLACES)
    assert (found and found.hosts) == leaving
    assert found is None or text in found.text


def test_under_slurm_spare_nodes_are_excluded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(tmp_path, "node-1", "head")
    monkeypatch.setenv("CLAE_NODES", "3")
    for spare, leaving in (("0", ()), ("1", ("head",)), ("2", ("node-1", "head"))):
        monkeypatch.setenv("CLAE_SPARE_NODES", spare)
        found = decide(Config(run_dir=str(tmp_path)), PLACES)
        assert found is not None
        assert found.hosts == leaving


def test_a_host_that_failed_twice_does_not_join_until_it_is_readmitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, here = write_run(tmp_path / "run").path, os.uname().nodename
    monkeypatch.setenv("CLAE_NODES", "2:3")

    def join() -> int:
        return exclusion.main(["join", "quickstart", f"run_dir={run_dir}"])

    assert join() == 0
    fail(run_dir, here)
    assert join() == 4
    assert f"this host does not join: {here} ended two starts in a row" in capsys.readouterr().err
    assert exclusion.main(["names", "quickstart", f"run_dir={run_dir}"]) == 0
    assert capsys.readouterr().out == f"{here}\n"
    main(["status", str(run_dir)])
    assert f"exclude this host: {here} ended two starts" in capsys.readouterr().out
    write_heartbeat(run_dir, beat(hosts=[here]))
    main(["status", str(run_dir)])
    assert "exclude this host" not in capsys.readouterr().out  # it is the only one
    main(["status", str(run_dir), "--readmit", here])
    assert "exclude this host" not in capsys.readouterr().out
    assert join() == 0
    assert main(["status", str(run_dir), "--readmit", here]) == 2
    assert "does not exclude; excluded hosts: none" in capsys.readouterr().err
    record_end(run_dir, end(start=90.0, host=here, cause="host"))  # one failure, then one of before is no pair
    assert excluded_hosts(run_dir) == {}
    fail(run_dir, here)
    assert join() == 4
    assert exclusion.main(["join", "quickstart", "no.such.key=1"]) == 0  # reported by the run
    fail(run_dir, "node-1")  # one host may be excluded: the one that failed last
    assert join() == 0


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("[/w/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:12951: Connection reset by peer.", "node-2"),
        ("[/w/gloo/transport/tcp/pair.cc:553] Connection closed by peer [fe80::1]:77", "node-3"),
        ("NCCL error: socketProgress: Connection closed by remote peer node-3<4123>", "node-3"),
        ("NCCL error: socketProgress: Connection closed by remote peer 10.0.0.2<4123>", "node-2"),
        ("NCCL error: remote process exited or there was a network error", ""),
        ("Connection closed by peer [10.0.0.9]:1", ""),
    ],
)
def test_the_host_of_a_rank_that_vanished_is_that_of_the_lost_connection(text: str, host: str, tmp_path: Path) -> None:
    attempt = Attempt(1.0, addresses={"10.0.0.2": "node-2", "fe80::1": "node-3"})
    attempt.end(tmp_path, 0, 4, "network", 8, text, host="node-1")
    attempt.end(tmp_path, 3, 4, "network", 8, "Connection closed by peer [10.0.0.1]:1", host="node-4")  # node-1 has left, too
    (found,) = read_ends(tmp_path)
    assert (found.cause, found.host) == ("host", host)
