"""The hosts that other tests use: apart from each other, and gone afterwards."""

from __future__ import annotations

import pytest

from tests import processes
from tests.hosts.cluster import Hosts, is_running

PING = ["python3", "-c", "import socket, sys; socket.create_connection((sys.argv[1], 7), 0.5)"]


def reaches(hosts: Hosts, host: int, other: int) -> bool:
    """Nothing listens: a host that is there refuses, one that is cut off says nothing."""
    return "ConnectionRefused" in hosts.run(host, [*PING, hosts.name(other)]).stdout


def test_hosts_have_names_and_addresses_and_can_be_cut_off(hosts: Hosts) -> None:
    assert hosts.run(1, ["hostname"]).stdout.strip() == "host1"
    assert reaches(hosts, 0, 2)
    assert reaches(hosts, 2, 1)
    hosts.link_down(2)
    assert not reaches(hosts, 0, 2)
    assert reaches(hosts, 0, 1)
    hosts.link_up(2)
    assert reaches(hosts, 0, 2)


@pytest.mark.usefixtures("hosts")
def test_nothing_is_left_even_after_a_failure() -> None:
    def fail() -> None:
        with Hosts(2) as hosts:
            process = hosts.popen(1, ["sh", "-c", "trap '' TERM; setsid sleep 1000 & echo started; wait"])
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            pids.extend(hosts.pids(1))
            tags.append(hosts.tag)
            raise KeyError

    pids: list[int] = []
    tags: list[str] = []
    with pytest.raises(KeyError):
        fail()
    assert len(pids) >= 2
    assert [pid for pid in pids if is_running(pid)] == []
    left = processes.run("sh", "-c", "ip link; ip netns; ls ${TMPDIR:-/tmp}")
    assert tags[0] not in left.stdout
