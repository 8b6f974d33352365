"""kill -9 of a rank and of what has started it, under each launcher, with loader processes: nothing of the run is left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from tests import processes

ROOT = Path(__file__).parents[2]
RECIPE = """\
data: {image_size: 16, workers: 2}
batch: {global_size: 16}
model: {encoder: small_resnet, projector_dim: 16}
optim: {name: adamw, learning_rate: 1e-3, scaling: none, warmup_epochs: 0}
train: {epochs: 100000, log_every: 1, diagnose_every: 1000000, knn_every: 0}
tracking: {name: none}
launch: {workers: 2}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("data") / "shards", 100, 16, num_shards=3)


@contextmanager
def running(start: list[str], shards: Manifest, folder: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A run of two ranks with two loader processes each, in its third step, and its mark."""
    (folder / "endless.yaml").write_text(RECIPE)
    mark = processes.new_mark()
    environment = {**os.environ, **mark, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    environment["CLAE_ENV"] = sys.prefix
    start = [word.replace("FREE_PORT", str(free_port())) for word in start]
    settings = [str(folder / "endless.yaml"), f"data.shards={shards.folder}", f"run_dir={folder / 'run'}"]
    with subprocess.Popen(
        [*start, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        try:
            until(process, "step 3/")
            yield process, mark
        finally:
            processes.end(mark)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(process: subprocess.Popen[str], words: str) -> None:
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if words in " ".join(line.split()):
            return
    pytest.fail(f"the run ended before {words!r}:\n{said}")


def ranks_of(mark: dict[str, str]) -> list[psutil.Process]:
    """Ranks, each of which has started the fork server of its loader processes."""
    of_loaders = [other for other in processes.marked(mark) if _is_for_loaders(other)]  # servers, and loaders forked from them
    parents = [process.parent() for process in of_loaders]
    return sorted({parent for parent in parents if not _is_for_loaders(parent)}, key=id)


def _is_for_loaders(process: psutil.Process) -> bool:
    return process.name() == "clae-loaders"


CLAE = [sys.executable, "-m", "clae_dist", "train", "--launcher"]
TORCHRUN = [str(ROOT / "launch" / "torchrun.sh"), "--nodes", "1", "--ranks-per-node", "2", "--head"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [
        pytest.param([*CLAE, "local"], id="local"),
        pytest.param([*TORCHRUN, "127.0.0.1:FREE_PORT"], id="torchrun.sh"),
        pytest.param([*CLAE, "ray"], id="ray"),
    ],
)
def test_nothing_outlives_a_killed_rank_or_a_killed_launcher(start: list[str], shards: Manifest, tmp_path: Path) -> None:
    with running(start, shards, tmp_path) as (process, mark):
        ranks = ranks_of(mark)
        assert len(ranks) == 2
        first = {below.pid for rank in ranks for below in (rank, *rank.children(recursive=True))}
        assert len(first) >= 8  # rank, server and two loaders each
        others = frozenset(other.pid for other in processes.marked(mark)) - first
        ranks[1].kill()
        until(process, "step 3/")  # started again
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
