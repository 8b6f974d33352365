"""The numbers of Ray workers that an elastic run takes, of nodes that Ray says are alive."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ray.train import ScalingConfig

from clae_dist.launchers import ray_elastic
from clae_dist.launchers.ray_elastic import WorkingSizes, silent
from clae_dist.runs.folder import RunFolder

ONE = {"CPU": 1.0}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, socket.socket]]:
    """Three nodes of a core each, by name; one whose socket is closed is cut off."""
    with ExitStack() as stack:
        ports = {f"node{number}": stack.enter_context(socket.create_server(("127.0.0.1", 0))) for number in range(3)}
        listed = [
            {
                "NodeID": name,
                "Alive": True,
                "NodeManagerAddress": "127.0.0.1",
                "NodeManagerPort": port.getsockname()[1],
                "NodeManagerHostname": f"host-{name}",
                "Resources": ONE,
            }
            for name, port in ports.items()
        ]
        monkeypatch.setattr(ray_elastic.ray, "nodes", lambda: listed)
        monkeypatch.setattr(ray_elastic, "_draining_nodes", dict)
        monkeypatch.setattr(ray_elastic, "_CALL_S", 0.0)
        yield ports


def policy(folder: Path, sizes: list[int]) -> WorkingSizes:
    config = ScalingConfig(num_workers=(sizes[0], sizes[-1]), resources_per_worker=ONE)
    return WorkingSizes(config, sizes, RunFolder(folder).stop_file, 1.0)


def count(policy: WorkingSizes, *reserved: str) -> int:
    return policy._count_possible_workers(dict.fromkeys(reserved, ONE))


def label(policy: WorkingSizes) -> Any:
    return policy.on_controller_start_worker_group(scaling_config=policy.scaling_config, num_workers=2)


def test_a_host_that_takes_no_connection_has_no_rank_until_it_does(nodes: dict[str, socket.socket], tmp_path: Path) -> None:
    """Ray counts it as alive for a minute, and its resources as reserved."""
    chosen = policy(tmp_path, [2, 3])
    assert count(chosen, *nodes) == 3
    assert label(chosen) is None
    at = nodes["node1"].getsockname()
    nodes["node1"].close()
    assert count(chosen, *nodes) == 2
    assert count(chosen, *nodes) == 2
    assert label(chosen) == {"ray.io/node-id": "!in(node1)"}
    said = RunFolder(tmp_path).console_file.read_text().splitlines()
    assert said == [
        f"ray: host-node1 takes no connection at 127.0.0.1:{at[1]}: it is down, or cut off by the network. "
        "No rank is placed on it until it answers."
    ]
    with socket.create_server(at):
        assert count(chosen, *nodes) == 3
        assert label(chosen) is None
    assert count(chosen, *nodes) == 2
    assert RunFolder(tmp_path).console_file.read_text().splitlines() == said * 2  # it is lost again


def test_a_run_that_needs_the_silent_host_waits_for_it(nodes: dict[str, socket.socket], tmp_path: Path) -> None:
    nodes["node2"].close()
    assert count(policy(tmp_path, [3]), *nodes) == 0


def test_a_silent_host_that_was_reserved_in_place_of_a_good_one_is_replaced(
    nodes: dict[str, socket.socket], tmp_path: Path
) -> None:
    nodes["node0"].close()
    chosen = policy(tmp_path, [2])
    assert count(chosen, "node0", "node1") == 2
    assert label(chosen) == {"ray.io/node-id": "!in(node0)"}


def test_an_address_that_drops_what_comes_is_silent(nodes: dict[str, socket.socket]) -> None:
    """A full backlog, as of a host that is gone: nothing is refused, and nothing is answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as stack:
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        found = silent({"full": full.getsockname(), "up": nodes["node0"].getsockname()})
    assert found == {"full"}
