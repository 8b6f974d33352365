"""`python -m clae_dist.launchers.ray_cluster …`: what launch/ray-cluster.sh asks of Ray."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clae_dist.versions import differences, host_versions
from clae_dist.wording import count_of

_NAMESPACE, _KEY = b"clae-dist", b"versions"
_WAY_OUT = "install the same on all hosts (launch/env.sh of the same checkout does), then start this one again."


def announce(address: str) -> str:
    """On the head: writes down its versions for those that want to join."""
    told = json.dumps({**host_versions(), "host": platform.node()})
    _store(address).internal_kv_put(_KEY, told.encode(), True, _NAMESPACE)
    return ""


def check(address: str) -> str:
    """On a host that wants to join: "" when it may, else what differs."""
    told = _store(address).internal_kv_get(_KEY, _NAMESPACE)
    if told is None:
        return f"the cluster at {address} was not started by ray-cluster.sh head, so versions cannot be compared; start it so."
    head = json.loads(told)
    name = head.pop("host")
    different = differences(host_versions(), head, platform.node(), name)
    return f"{different}; {_WAY_OUT}" if different else ""


def compare(address: str) -> str:
    """On any host of the cluster: runs a task on every live node; "" when all have the versions of this one."""
    ray = _connect(address)
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        ask = ray.remote(num_cpus=0)(_versions_and_name)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        asked = [
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
            for node in nodes
        ]
        here = host_versions()
        told = ray.get(asked, timeout=120)
        different = [text for there, name in told if (text := differences(there, here, name, platform.node()))]
        print(f"{count_of(len(nodes), 'node')}, {ray.cluster_resources().get('CPU', 0):g} CPUs, ", end="")
        print(f"{ray.cluster_resources().get('GPU', 0):g} GPUs; {', '.join(f'{k} {v}' for k, v in here.items())}")
        return f"{'; '.join(different)}; {_WAY_OUT}" if different else ""
    finally:
        ray.shutdown()


def status(address: str) -> str:
    """Prints a line for every node that the cluster has had."""
    ray = _connect(address)
    try:
        for node in ray.nodes():
            resources = ", ".join(f"{node['Resources'].get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
            state = "alive" if node["Alive"] else "gone"
            print(f"{node['NodeManagerHostname']:20} {node['NodeManagerAddress']:16} {state:6} {resources}  {node['NodeID']}")
    finally:
        ray.shutdown()
    return ""


def wait(address: str, num_nodes: str, timeout_s: str) -> str:
    """Until the cluster has so many nodes; "" then."""
    ray = _connect(address)
    try:
        deadline = time.monotonic() + float(timeout_s)
        while (alive := sum(node["Alive"] for node in ray.nodes())) < int(num_nodes):
            if time.monotonic() > deadline:
                return f"{alive} of {num_nodes} nodes came within {timeout_s} s; the others' output says why."
            time.sleep(0.5)
    finally:
        ray.shutdown()
    return ""


def _versions_and_name() -> tuple[dict[str, str], str]:
    return host_versions(), platform.node()


def _store(address: str) -> Any:
    """The cluster's key-value store: also hosts that are no part of it can ask."""
    import ray

    return ray._raylet.GcsClient(address=address)


def _connect(address: str) -> Any:
    import ray

    package = str(Path(__file__).parents[2])
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}}
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
    return ray


def main(arguments: list[str]) -> int:
    """Runs `announce|check|compare|status|wait ADDRESS …`; prints what is wrong, and is 2 then."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    name, *rest = arguments
    commands: dict[str, Callable[..., str]] = {
        "announce": announce,
        "check": check,
        "compare": compare,
        "status": status,
        "wait": wait,
    }
    try:
        problem = commands[name](*rest)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        problem = (
            f"the cluster at {rest[0]} does not answer ({lines[-1].strip()}); is the head running, and the token the same?"
        )
    if problem:
        print(problem, file=sys.stderr)
    return 2 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
