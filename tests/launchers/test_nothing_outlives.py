"""kill -9 of a rank and of what has started it, under each launcher, with loader processes: nothing of the run is left."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import psutil
import pytest

from tests import processes
from tests.processes import CLAE, ROOT, read_until, started

ENDLESS = ("data.workers=2", "train.epochs=100000", "train.diagnose_every=1000000", "checkpoint.every_steps=0")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks_of(mark: dict[str, str]) -> list[psutil.Process]:
    """Ranks, each of which has started the fork server of its loader processes."""
    of_loaders = [other for other in processes.marked(mark) if _is_for_loaders(other)]  # servers, and loaders forked from them
    parents = [process.parent() for process in of_loaders]
    return sorted({parent for parent in parents if not _is_for_loaders(parent)}, key=id)


def _is_for_loaders(process: psutil.Process) -> bool:
    return process.name() == "clae-loaders"


TORCHRUN = [str(ROOT / "launch" / "torchrun.sh"), "--nodes", "1", "--ranks-per-node", "2", "--head"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [
        pytest.param([*CLAE, "train", "--launcher", "local"], id="local"),
        pytest.param([*TORCHRUN, "127.0.0.1:FREE_PORT"], id="torchrun.sh"),
        pytest.param([*CLAE, "train", "--launcher", "ray"], id="ray"),
    ],
)
def test_nothing_outlives_a_killed_rank_or_a_killed_launcher(start: list[str], recipe: Path, tmp_path: Path) -> None:
    """A run of two ranks with two loader processes each."""
    line = [word.replace("FREE_PORT", str(free_port())) for word in start]
    mark, environment = processes.new_mark(), processes.environment(CLAE_ENV=sys.prefix)
    with started(*line, recipe, f"run_dir={tmp_path / 'run'}", *ENDLESS, env=environment, mark=mark) as process:
        read_until(process, "step 3/")
        ranks = ranks_of(mark)
        assert len(ranks) == 2
        first = {below.pid for rank in ranks for below in (rank, *rank.children(recursive=True))}
        assert len(first) >= 8  # rank, server and two loaders each
        others = frozenset(other.pid for other in processes.marked(mark)) - first
        ranks[1].kill()
        read_until(process, "step 3/")  # started again
        again = {other.pid for other in processes.marked(mark)} - first
        processes.wait_until_gone(mark, but=frozenset(again) | others)
        process.kill()
        process.wait()
        agents = frozenset(other.pid for other in processes.marked(mark) if _is_rays_agent(other))
        processes.wait_until_gone(mark, but=agents)
        processes.wait_until_gone(mark, within_s=60.0)


def _is_rays_agent(process: psutil.Process) -> bool:
    """True for Ray's own agents, which look for their parent only now and then, when Ray is killed from outside."""
    try:
        return " ".join(process.cmdline()).startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
