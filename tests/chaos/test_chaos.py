"""Whatever is killed in the night: the run ends, its weights are the undisturbed run's bit for bit, each image counts once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from tests import processes
from tests.chaos.faults import FAULTS
from tests.chaos.history import assert_exactly_once, records, surviving_steps
from tests.chaos.night import NUM_HOSTS, Mended, Night, environment
from tests.hosts.cluster import Hosts
from tests.hosts.needs import require_hosts
from tests.hosts.ray_cluster import RayCluster
from tests.processes import Process

GLOBAL_SIZE = 24
NUM_IMAGES = 600
STEPS_PER_EPOCH = NUM_IMAGES // GLOBAL_SIZE
EVERY_STEPS = 16  # a fault
# test_convnext: 79 images/s where small_resnet makes 28 (three ranks on two cores, one run each).
RECIPE = f"""\
data: {{image_size: 32, workers: 0, cache_bytes: 800000, prefetch_shards: 2, timeout_s: 5, verify: size}}
batch: {{global_size: {GLOBAL_SIZE}}}
model: {{encoder: timm/test_convnext, projector_dim: 16}}
optim: {{name: adamw, learning_rate: 1e-3, scaling: none, warmup_epochs: 0}}
train: {{log_every: 1, diagnose_every: 1000, knn_every: 0, threads: 1}}
checkpoint: {{every_steps: 5, keep: 3}}
guard: {{hang_s: 20}}
launch: {{workers: {NUM_HOSTS}, max_failures: 1000}}
"""
BACKENDS = {
    "ddp": ["parallel.backend=ddp"],
    "fsdp2": ["parallel.backend=fsdp2"],
    "zero2": ["parallel.backend=deepspeed", "parallel.zero_stage=2"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("data") / "shards", NUM_IMAGES, 16, num_shards=12)


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    processes.run("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", folder, check=True)
    try:
        yield folder
    finally:
        processes.run("umount", "--lazy", folder, check=True)


def undisturbed_weights(folder: Path, recipe: Path, shards: Manifest, settings: list[str]) -> dict[str, torch.Tensor]:
    """The weights of the same run on this machine alone, with as many ranks."""
    run_dir = folder / "undisturbed"
    words = [f"data.shards={shards.folder}", f"run_dir={run_dir}", *settings, "tracking.name=none", "launch.launcher=local"]
    done = processes.clae("train", recipe, *words, timeout=None)
    assert done.returncode == 0, done.stdout + done.stderr
    return weights(run_dir)


def server(hosts: Hosts, *command: str) -> Process:
    quiet = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight processes that nobody needs here
    no_output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return processes.popen(sys.executable, "-m", *command, cwd=Path("/"), env=quiet, **no_output)


def spend(folder: Path, shards: Manifest, backend: str, faults: list[str], seed: int, *, tracked: bool) -> list[Mended]:
    """One night: the run is disturbed by `faults` in turn, ends, and is compared with the undisturbed one."""
    print(f"seed {seed}, {backend}: {', '.join(faults)}", flush=True)
    draw = random.Random(seed)
    num_steps = EVERY_STEPS * (len(faults) + 1)
    recipe = folder / "night.yaml"
    recipe.write_text(RECIPE)
    settings = [f"train.epochs={num_steps / STEPS_PER_EPOCH!r}", *BACKENDS[backend]]
    expected = undisturbed_weights(folder, recipe, shards, settings)
    with (
        small_disk(folder / "disk", 256 << 20) as disk,  # first: hosts see what was mounted before they were there
        Hosts(NUM_HOSTS) as hosts,
        RayCluster(hosts, environment(folder)) as cluster,
    ):
        night = Night(cluster, folder, disk, [], recipe, draw)
        night.shard_server = server(hosts, "http.server", "8765", "--bind", hosts.outside, "--directory", str(shards.folder))
        night.settings = [f"data.shards=http://{hosts.outside}:8765", *settings]
        if tracked:
            night.mlflow = mlflow_server(hosts, folder)
            night.settings.append(f"tracking.uri=http://{hosts.outside}:8766")
        else:
            night.settings.append("tracking.name=none")
        try:
            night.start()
            mended = []
            for number, name in enumerate(faults):
                step = EVERY_STEPS * number + draw.randrange(6, EVERY_STEPS)
                mended.append(night.suffer(name, FAULTS[name], step))
                print(mended[-1], flush=True)
            night.finish()
            found = weights(night.run_dir)
        except BaseException:
            print(night.tail(), flush=True)
            raise
        finally:
            night.close()
    assert_exactly_once(surviving_steps(records(night.records)), num_steps, STEPS_PER_EPOCH, GLOBAL_SIZE)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name} differs by {(found[name] - value).abs().max()}"
    return mended


def mlflow_server(hosts: Hosts, folder: Path) -> Callable[[], Process]:
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
    where = ["--host", hosts.outside, "--port", "8766", "--allowed-hosts", "*", "--workers", "1"]
    return lambda: server(hosts, "mlflow", "server", *store, *where)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    from clae_dist.runs.checkpoint import load_model

    return dict(load_model(run_dir)[1].state_dict())


def seed_of_the_night() -> int:
    """CLAE_CHAOS_SEED, to have the same night again; another one each time without."""
    return int(os.environ.get("CLAE_CHAOS_SEED") or random.SystemRandom().randrange(1 << 16))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_night(tmp_path: Path, shards: Manifest) -> None:
    require_hosts()
    faults = ["SIGSTOP a rank", "flipped bytes in the newest checkpoint"]
    spend(tmp_path, shards, "ddp", faults, seed_of_the_night(), tracked=False)


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_night(tmp_path: Path, shards: Manifest, backend: str) -> None:
    """Every fault, and some again, in a random order."""
    require_hosts()
    seed = seed_of_the_night()
    draw = random.Random(seed)
    faults = [*FAULTS, *draw.choices(list(FAULTS), k=17 - len(FAULTS))]
    draw.shuffle(faults)
    mended = spend(tmp_path, shards, backend, faults, seed, tracked=True)
    assert len(mended) == len(faults)
    print("\n| backend | fault | at step | s to the next new step | steps again | commands |\n|---|---|---|---|---|---|")
    for one in mended:
        print(f"| {backend} | {one.fault} | {one.step} | {one.seconds:.0f} | {one.repeated} | {one.commands} |")
