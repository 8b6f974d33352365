"""How many Ray Train workers there are, and when that should change: in Ray's controller, beside the ranks.

Ray's elastic policy takes any number between a smallest and a largest, and restarts ranks where they stand. Here only numbers
that can share the global batch count, and before a change that can wait, ranks are asked (by the run folder's STOP file) to
save and leave; launchers/ray.py then starts them again. So growing, or leaving a host that will be taken away, loses no step.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, autoscaling_coordinator_client

from clae_dist.escape import shown
from clae_dist.launchers.ray import CHANGE
from clae_dist.runs.exclusion import excluded_hosts, why_excluded
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.mirror import add_to_console, ask_to_stop, fetch_ends, stop_asked
from clae_dist.staging import staging_folder, url_of
from clae_dist.training.guard import TAKEN_AWAY

_CLAIM_S = 45  # Ray renews a run's claim to hosts every 20 s
_PAUSE_S = 0.2
_FETCH_S = 5.0  # between looks at object storage
_CALL_S = 2.0  # between calls of all nodes
_ANSWER_S = 3.0  # a lost packet is sent again after 1 s
_EXCLUDED = "It is excluded."
_STILL_USED = "There is no room without it, so that it is still used: add a host, and remove this one with `ray drain-node`."


class WorkingSizes(ElasticScalingPolicy):
    """Takes the largest of `sizes` for which there is room on hosts that stay.

    Hosts that failed twice without progress (runs/exclusion.py) are excluded, unless there is no room for any size then. Hosts
    that take no connection always are: Ray counts a host whose link is down for another minute, and would wait for it.
    """

    def __init__(self, scaling_config: ScalingConfig, sizes: Sequence[int], stop_file: Path, check_every_s: float) -> None:
        super().__init__(scaling_config)
        self._sizes, self._check_every_s = sizes, check_every_s
        self._folder, self._url = stop_file.parent, url_of(stop_file.parent)
        self._checked = float("-inf")
        self._more_at = 0  # a larger size that was possible at the last check, too
        self._excluded: list[str] = []  # nodes
        self._said: set[str] = set()
        self._fetched = self._called = float("-inf")
        self._silent: set[str] = set()  # nodes

    @property
    def _stop_file(self) -> Path:
        """In the run folder, or where this process, whose environment is not that of the submitter, stages the run's URL."""
        return RunFolder(staging_folder(self._url) if self._url else self._folder).stop_file

    def after_controller_start(self, train_run_context: Any) -> None:
        # The claim of a controller that was killed stands, for 180 s if Ray has its way: the run that takes its place waits.
        autoscaling_coordinator_client.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = _CLAIM_S
        super().after_controller_start(train_run_context)

    def make_decision_for_non_running_worker_group(self) -> Any:
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(_PAUSE_S)  # the controller asks again at once
        return decision

    def _count_possible_workers(self, reserved_resources: dict[str, Any]) -> int:
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        staying = set(nodes) - set(_draining_nodes()) - self._call(nodes)
        folder = self._stop_file.parent
        if time.monotonic() - self._fetched > _FETCH_S:
            self._fetched = time.monotonic()
            fetch_ends(folder)
        failed_hosts = excluded_hosts(folder)
        failed = {node for node in staying if nodes[node]["NodeManagerHostname"] in failed_hosts}
        good = staying - failed
        # All of the cluster: Ray knows nothing of these hosts, and may have reserved one of them in place of a good one.
        room = self._size_for({node: nodes[node]["Resources"] for node in good}) if failed or self._silent else 0
        self._excluded = sorted(self._silent | (failed if room else set()))
        for host in {nodes[node]["NodeManagerHostname"] for node in failed}:
            self._say(f"ray: {why_excluded(host, failed_hosts[host], folder)} {_EXCLUDED if room else _STILL_USED}")
        size = self._size_for({node: reserved_resources.get(node, {}) for node in (good if room else staying)})
        return size or (self._sizes[0] if room else 0)

    def _call(self, nodes: Mapping[str, Any]) -> set[str]:
        """The nodes that take no connection now; one that has just stopped to is named in the console."""
        if time.monotonic() - self._called > _CALL_S:
            before = self._silent
            self._silent = silent({node: (at["NodeManagerAddress"], at["NodeManagerPort"]) for node, at in nodes.items()})
            self._called = time.monotonic()
            for at in (nodes[node] for node in sorted(self._silent - before)):
                where = f"{at['NodeManagerHostname']} takes no connection at {at['NodeManagerAddress']}:{at['NodeManagerPort']}"
                self._write(f"ray: {where}: it is down, or cut off by the network. No rank is placed on it until it answers.")
        return self._silent

    def _size_for(self, resources: dict[str, Any]) -> int:
        possible = int(super()._count_possible_workers(resources))
        return max((size for size in self._sizes if size <= possible), default=0)

    def _say(self, line: str) -> None:
        """Append a line to the run's console, once."""
        if line not in self._said:
            self._write(line)
        self._said.add(line)

    def _write(self, line: str) -> None:
        with suppress(OSError):
            add_to_console(self._stop_file.parent, f"{shown(line)}\n")

    def on_controller_start_worker_group(self, *, scaling_config: ScalingConfig, num_workers: int) -> dict[str, str] | None:
        """The label that nodes of workers must have."""
        return {"ray.io/node-id": f"!in({','.join(self._excluded)})"} if self._excluded else None

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> NoopDecision:
        self._maybe_send_resource_request()
        now = time.monotonic()
        if now - self._checked >= self._check_every_s:
            self._checked = now
            folder = self._stop_file.parent
            with suppress(OSError):  # the next check tries again
                if (reason := self._why_change(worker_group_state)) and not stop_asked(folder):
                    ask_to_stop(folder, CHANGE + reason)
        return NoopDecision()

    def _why_change(self, running: Any) -> str:
        in_use = {worker.metadata.node_id for worker in running.workers}
        if leaving := in_use & set(_draining_nodes()):
            names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
            return f"{', '.join(sorted(names.get(node, node) for node in leaving))} {TAKEN_AWAY}"
        reserved = self._get_reserved_resources()
        possible = self._count_possible_workers(reserved) if reserved is not None else 0
        # Twice: a host that has just come back may not be ready, or be about to go again.
        stable, self._more_at = possible > running.num_workers and possible == self._more_at, possible
        return f"room for {possible} workers instead of {running.num_workers}" if stable else ""


def silent(addresses: Mapping[str, tuple[str, int]]) -> set[str]:
    """The names whose address takes no TCP connection within 3 s."""

    def answers(address: tuple[str, int]) -> bool:
        try:
            socket.create_connection(address, timeout=_ANSWER_S).close()
        except OSError:
            return False
        return True

    with ThreadPoolExecutor(64) as pool:
        return {name for name, up in zip(addresses, pool.map(answers, addresses.values()), strict=True) if not up}


def _draining_nodes() -> dict[str, int]:
    """Nodes that are going to be taken away, and until when (ms since 1970; 0: not said)."""
    nodes: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return nodes


class Trainer(TorchTrainer):
    """Ray's trainer with another policy; its constructor has no argument for one."""

    def __init__(self, *arguments: Any, policy: WorkingSizes, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._policy = policy

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        return super()._initialize_and_run_controller(**{**settings, "scaling_policy": self._policy})
