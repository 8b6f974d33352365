"""The console of a run in a bucket and requests to stop it, from processes on any node."""

from __future__ import annotations

import pickle
import platform
from dataclasses import replace
from pathlib import Path

import pytest
from ray.train import ScalingConfig

from clae_dist.config import Config
from clae_dist.launchers import ray
from clae_dist.launchers.ray_elastic import WorkingSizes
from clae_dist.runs import following, mirror, record
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.following import ConsoleObjects, FollowedFile, follow
from clae_dist.runs.mirror import add_to_console, ask_to_stop, check_nodes, forget_stop, mirrored, stop_asked
from clae_dist.runs.record import Record
from clae_dist.staging import copy_folder, staging_folder, url_of
from clae_dist.world import World
from tests.object_server import ON_BOTH, ObjectServer


class Node:
    """A machine with a cache of its own."""

    def __init__(self, url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._url, self._cache, self._monkeypatch = url, str(cache), monkeypatch

    def enter(self) -> Path:
        """The staging folder there; this process is there from now on."""
        self._monkeypatch.setenv("CLAE_CACHE", self._cache)
        return staging_folder(self._url)


@pytest.fixture
def node(bucket: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """The one of rank 0, where the run has begun."""
    made = Node(bucket.url, tmp_path / "main", monkeypatch)
    made.enter().mkdir(parents=True)
    (made.enter() / "config.yaml").write_text("name: first\n")
    push(say(made.enter(), "one\n"))
    return made


@pytest.fixture
def other(node: Node, bucket: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(bucket.url, tmp_path / "other", monkeypatch)


def say(folder: Path, text: str) -> Path:
    with RunFolder(folder).console_file.open("a") as file:
        file.write(text)
    return folder


def push(folder: Path) -> None:
    ours = Record.of(folder)
    assert ours is not None
    ours.push()


def start(folder: Path) -> str:
    """The console after the next start of ranks, whose rank 0 is on this node."""
    with mirrored(folder, World.single("cpu"), pytest.fail) as running:
        running.share()
    return RunFolder(folder).console_file.read_text()


def test_lines_of_other_nodes_reach_the_console(node: Node, other: Node, bucket: ObjectServer) -> None:
    """Once, in their order, also on a node that had the last word itself; and in copies for readers, however often."""
    add_to_console(other.enter(), "rank 2 hangs\n")
    add_to_console(other.enter(), "ray: host2 is excluded, see https://me:canary@host/a\n")
    add_to_console(node.enter(), "rank 0 leaves\n")
    expected = "one\nrank 0 leaves\nrank 2 hangs\nray: host2 is excluded, see https://host/a\n"
    for _ in range(2):
        copy = copy_folder(bucket.url)
        reader = Record.of(copy)
        assert reader is not None
        reader.pull(record.TO_READ)
        assert sorted(RunFolder(copy).console_file.read_text().splitlines()) == sorted(expected.splitlines())
    assert start(node.enter()) == expected  # its credentials are gone
    assert [name for name in bucket.names() if "/console/" in name] == []
    assert start(other.enter()) == expected


@ON_BOTH
def test_a_console_is_followed_through_parts_that_are_joined(node: Node, other: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """And lines of other nodes are shown at once, not again when they come with rank 0's parts."""
    monkeypatch.setattr(record, "_MOST_PARTS", 3)
    store = Record.of(node.enter())
    assert store is not None
    console = ConsoleObjects(store.store)
    assert console.read() == "one\n"
    unread = ""
    for number in range(9):
        say(node.enter(), f"step {number} ✓\n")
        unread += f"step {number} ✓\n"
        store.push()
        if number % 3 != 1:
            assert console.read() == unread
            unread = ""
    add_to_console(other.enter(), "rank 2 hangs\n")
    assert console.read() == "rank 2 hangs\n"
    assert console.read() == ""
    say(node.enter(), "rank 2 hangs, says rank 0\n")
    assert "rank 2 hangs\n" in start(node.enter())
    assert console.read() == "rank 2 hangs, says rank 0\n"


def test_followed_from_another_node(node: Node, other: Node, bucket: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its present end; a store that fails costs time alone."""
    monkeypatch.setattr(following, "EVERY_S", 0.02)
    monkeypatch.setattr(following, "_RETRY_S", 0.1)
    console = follow(other.enter(), here=False)
    push(say(node.enter(), "two\n"))
    said = ""
    while not said:  # the test's limit ends a thread that never looks
        said = console.read()
    bucket.faults.choose = lambda request: "500"
    say(node.enter(), "three\n")
    bucket.faults.choose = lambda request: ""
    push(node.enter())
    assert said + console.close() == "two\nthree\n"


def test_a_request_reaches_ranks_on_other_nodes(
    node: Node, other: Node, bucket: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that comes while they start. Once it is withdrawn, the next start does not find it on its own disk."""
    monkeypatch.setattr(mirror, "EVERY_S", 0.02)
    ask_to_stop(other.enter(), "SIGUSR1")
    stop = RunFolder(node.enter()).stop_file
    with mirrored(node.enter(), World.single("cpu"), pytest.fail) as running:
        running.share()
        while not (stop.exists() and stop.read_text() == "SIGUSR1"):
            continue  # the test's limit ends a thread that never asks
    assert stop_asked(other.enter()) == "SIGUSR1"
    forget_stop(other.enter())
    assert stop_asked(node.enter()) == ""
    with mirrored(node.enter(), World.single("cpu"), pytest.fail):
        assert not stop.exists()


def test_a_signal_to_rays_launcher_reaches_the_bucket(node: Node, bucket: ObjectServer) -> None:
    """At the first look that the store answers."""
    with ray._StopFile(RunFolder(node.enter()).stop_file) as stop:
        stop.hand_on()
        assert stop_asked(node.enter()) == ""
        ray.signal.raise_signal(ray.signal.SIGUSR1)
        bucket.faults.choose = lambda request: "AccessDenied"
        stop.hand_on()
        bucket.faults.choose = lambda request: ""
        stop.hand_on()
        assert stop_asked(node.enter()) == "SIGUSR1"
    assert stop_asked(node.enter()) == ""


def test_rays_controller_is_on_a_node_of_its_own(node: Node, other: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The submitter's cache is not that of the controller: its request and its lines reach the run through the bucket."""
    policy = WorkingSizes(ScalingConfig(num_workers=(1, 2)), [1, 2], RunFolder(node.enter()).stop_file, 1e-9)
    policy = pickle.loads(pickle.dumps(policy))
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    reasons = iter(["", "room for 2 workers", "room for 1 worker"])
    monkeypatch.setattr(policy, "_why_change", lambda running: next(reasons))
    for expected in ("", f"{ray.CHANGE}room for 2 workers", f"{ray.CHANGE}room for 2 workers"):
        other.enter()
        policy.make_decision_for_running_worker_group(None, None)
        assert stop_asked(node.enter()) == expected
    for _ in range(2):
        policy._say("ray: host2 is excluded")
    assert start(node.enter()) == "one\nray: host2 is excluded\n"


def test_a_cache_behind_a_link_stages_the_run(
    node: Node, bucket: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of Ray get the URL, not the path that the link leads to."""
    (tmp_path / "link").symlink_to(tmp_path / "main")
    monkeypatch.setenv("CLAE_CACHE", str(tmp_path / "link"))
    folder = ray._folder(Config(run_dir=bucket.url))
    assert (url_of(folder), url_of(folder.resolve())) == (bucket.url, "")


def test_a_file_that_is_removed_is_followed_when_it_begins_anew(tmp_path: Path) -> None:
    """A start empties the staging folder of a run that the bucket does not have."""
    path = tmp_path / "console.log"
    path.write_text("of an earlier run\n")
    console = FollowedFile(path)
    assert console.read() == ""
    path.write_bytes(path.read_bytes() + "√".encode()[:2])
    assert console.read() == ""
    path.write_bytes(path.read_bytes() + "√".encode()[2:])
    assert console.read() == "√"
    path.unlink()
    assert console.read() == ""
    path.write_text("new\n")
    assert console.read() == "new\n"
    path.write_text("n\n")
    assert console.close() == "n\n"


def test_a_node_without_credentials_is_named(node: Node, monkeypatch: pytest.MonkeyPatch, bucket: ObjectServer) -> None:
    """On all ranks, before one of them takes the lease; nothing is asked of a bucket on one machine."""
    bucket.faults.choose = lambda request: "AccessDenied"
    world, told = World.single("cpu"), list[str]()
    check_nodes(node.enter(), world)
    monkeypatch.setattr(World, "raise_together", lambda self, kind, problem: told.append(problem))
    for local_rank in (0, 1):
        check_nodes(node.enter(), replace(world, size=4, rank=2 + local_rank, local_rank=local_rank, local_size=2))
    assert told[0].startswith(f"on {platform.node()}: {bucket.url}")
    assert "access is denied" in told[0]
    assert told[1] == ""
