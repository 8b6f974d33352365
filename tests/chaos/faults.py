"""What can happen in a night: name -> what does it, and returns when the harm is over."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from clae_dist.runs.folder import RunFolder
from tests.chaos.night import NUM_HOSTS, Night, flip_bytes, free_bytes, kill_family
from tests.hosts.cluster import is_running

Fault = Callable[[Night], None]
_SEEN_WITHIN_S = 240.0


def _until(happened: Callable[[], bool], what: str, within_s: float = _SEEN_WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen in {within_s:g} s"
        time.sleep(0.01)


def _one_rank(night: Night) -> psutil.Process:
    ranks = night.rank_processes()
    assert ranks, "no rank is running"
    return night.draw.choice(ranks)


def kill_rank(night: Night) -> None:
    """kill -9 of one rank."""
    _one_rank(night).kill()


def stop_rank(night: Night) -> None:
    """A rank that neither goes on nor ends (SIGSTOP)."""
    _one_rank(night).send_signal(signal.SIGSTOP)


def kill_raylet(night: Night) -> None:
    """A host's raylet is killed; the host joins again when Ray there is gone."""
    host = night.draw.randrange(1, NUM_HOSTS)
    night.cluster.kill_raylet(host)
    _until(lambda: not night.processes(host, "ray::RayTrainWorker"), f"the end of the rank on host {host}")
    night.hosts.kill(host)
    night.cluster.join(host)


def lose_host(night: Night) -> None:
    """A host loses power and comes back."""
    host = night.draw.randrange(1, NUM_HOSTS)
    night.hosts.kill(host)
    night.cluster.join(host)


def cut_link(night: Night) -> None:
    """A host's link goes down until its raylet has given up, and comes up again."""
    host = night.draw.randrange(1, NUM_HOSTS)
    raylets = [process.pid for process in night.processes(host, "raylet") if process.name() == "raylet"]
    night.hosts.link_down(host)
    try:
        _until(lambda: not any(is_running(pid) for pid in raylets), f"host {host} noticing that it is alone")
    finally:
        night.hosts.link_up(host)
    night.hosts.kill(host)
    night.cluster.join(host)


def flap_link(night: Night) -> None:
    """A host's link goes down for a moment: what is on its way is sent again by TCP."""
    host = night.draw.randrange(1, NUM_HOSTS)
    night.hosts.link_down(host)
    begin = time.monotonic()
    _until(lambda: time.monotonic() - begin > 1, "a second")
    night.hosts.link_up(host)


def kill_driver(night: Night) -> None:
    """The user's process is killed."""
    for process in night.processes(0, "clae_dist train"):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def kill_controller(night: Night) -> None:
    """Ray Train's controller is killed."""
    found = [p for host in range(NUM_HOSTS) for p in night.processes(host, "ray::TrainController")]
    assert found, "no controller is running"
    for process in found:
        process.kill()


def kill_in_checkpoint(night: Night) -> None:
    """A rank is killed while a checkpoint is being written."""
    checkpoints = night.run_dir / "checkpoints"
    _until(lambda: any(checkpoints.glob("*.partial-*")), "a checkpoint being written")
    _one_rank(night).kill()


def damage_checkpoint(night: Night) -> None:
    """Bytes of the newest checkpoint are flipped, and a rank is killed."""
    newest = RunFolder(night.run_dir).find_checkpoints()[0]
    flip_bytes(night.draw.choice(sorted(newest.iterdir())), night.draw)
    _one_rank(night).kill()


def fill_disk(night: Night) -> None:
    """The file system of the run folder is full until the run has said so."""
    filler = night.disk / "filler"
    commands = night.commands
    with filler.open("wb") as file, suppress(OSError):
        while free_bytes(night.disk):
            file.write(bytes(1 << 20))
    assert night.submitted is not None
    submitted = night.submitted
    _until(lambda: submitted.poll() is not None, "the end of a run whose disk is full", 240)
    filler.unlink()
    assert night.commands == commands


def stop_mlflow(night: Night) -> None:
    """The MLflow server is killed, and started again some steps later."""
    assert night.mlflow is not None
    assert night.mlflow_server is not None
    kill_family(night.mlflow_server)
    reached = night.last_step() + 5
    night.wait(lambda: night.last_step() >= reached, "five steps without an MLflow server")
    night.mlflow_server = night.mlflow()


def stall_shards(night: Night) -> None:
    """The shard server stops answering for some seconds."""
    assert night.shard_server is not None
    night.shard_server.send_signal(signal.SIGSTOP)
    try:
        begin = time.monotonic()
        _until(lambda: time.monotonic() - begin > 8, "eight seconds")
    finally:
        night.shard_server.send_signal(signal.SIGCONT)


FAULTS: dict[str, Fault] = {
    "kill -9 a rank": kill_rank,
    "SIGSTOP a rank": stop_rank,
    "kill -9 a raylet": kill_raylet,
    "a host loses power": lose_host,
    "a host's link goes down": cut_link,
    "a link flaps": flap_link,
    "kill -9 the driver": kill_driver,
    "kill -9 the controller": kill_controller,
    "kill -9 during a checkpoint": kill_in_checkpoint,
    "flipped bytes in the newest checkpoint": damage_checkpoint,
    "the disk is full": fill_disk,
    "the MLflow server is away": stop_mlflow,
    "the shard server stalls": stall_shards,
}
