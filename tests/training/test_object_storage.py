"""Runs in a bucket: lost, on a store that fails, and resumed by machines that have staged nothing."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

from clae_dist import object_store
from clae_dist.config import Config
from clae_dist.data.manifest import Manifest
from clae_dist.errors import STOPPED
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.goodput import read_lines
from clae_dist.runs.record import APPENDED, TO_READ, Record
from clae_dist.staging import copy_folder
from clae_dist.world import World
from tests.fault_proxy import Request
from tests.object_server import BUCKET, ON_BOTH, ON_BOTH_LONG, ObjectServer
from tests.processes import CLAE, environment, finish, read_until, started
from tests.ranks import RankPool
from tests.training.disturbed import assert_bitwise, final, train_on
from tests.training.disturbed import recipe as settings


def on_store(world: World, config: Config, environment: dict[str, str], *disturbance: int) -> str:
    """train_on, with the variables of a store. With NODES=yes, each rank stages as if on a node of its own."""
    before = dict(os.environ)
    os.environ.update(environment)
    fsspec.config.set_conf_env(fsspec.config.conf)  # which it reads when it is imported
    if environment.get("NODES") == "yes":
        os.environ["CLAE_CACHE"] += f"-{world.rank}"
        world = replace(world, local_rank=0, local_size=1)
    object_store._filesystem.cache_clear()
    try:
        return train_on(world, config, *disturbance)
    finally:
        os.environ.clear()
        os.environ.update(before)


def failing(seed: int) -> Callable[[Request], str]:
    """One request in ten fails."""
    draws = random.Random(seed)
    return lambda request: draws.choice(["500", "503", "429", "cut", "lost", "reset"]) if draws.random() < 0.1 else ""


@pytest.mark.slow
@ON_BOTH
@pytest.mark.parametrize("nodes", ["", "yes"], ids=["one node", "two nodes"])
def test_a_run_that_was_lost_resumes_from_the_bucket(
    nodes: str, bucket: ObjectServer, shards: Manifest, ranks: RankPool, tmp_path: Path
) -> None:
    """Its first machines and their disks are gone; the bits are those of a local run that nothing disturbed."""
    whole = settings(shards, tmp_path / "whole", knn_every=0)
    assert ranks.run(2, train_on, whole) == ["finished"] * 2
    config = replace(whole, run_dir=bucket.url)
    variables = {**bucket.environment, "CLAE_CACHE": str(tmp_path / "cache"), "NODES": nodes}
    bucket.faults.choose, bucket.faults.latency_s = failing(1), 0.002
    assert ranks.run(2, on_store, config, variables, 6) == ["lost"] * 2
    for cache in tmp_path.glob("cache*"):
        shutil.rmtree(cache)
    assert ranks.run(2, on_store, config, variables) == ["finished"] * 2
    bucket.faults.choose = lambda request: ""
    assert_bitwise(final(config), final(whole))
    copy = copy_folder(bucket.url)
    record = Record.of(copy)
    assert record is not None
    record.pull(TO_READ)
    assert [line["event"] for line in read_lines(copy)].count("start") == 2
    assert {"config.yaml", "run.json", "metrics.jsonl", "goodput.jsonl"} <= {path.name for path in copy.iterdir()}
    assert [name for name in bucket.names() if "lease" in name or ".probe" in name] == []


@pytest.mark.slow
@ON_BOTH_LONG
def test_another_number_of_nodes_resumes(bucket: ObjectServer, shards: Manifest, ranks: RankPool, tmp_path: Path) -> None:
    """Three nodes of one rank each begin, two end it: pieces come from the bucket, each tensor to one rank."""
    whole = settings(shards, tmp_path / "whole", precision="float64", knn_every=0, diagnose_every=100)
    assert ranks.run(1, train_on, whole) == ["finished"]
    config = replace(whole, run_dir=bucket.url)
    variables = {**bucket.environment, "CLAE_CACHE": str(tmp_path / "cache"), "NODES": "yes"}
    assert ranks.run(3, on_store, config, variables, 0, 6) == ["stopped"] * 3
    for cache in tmp_path.glob("cache*"):
        shutil.rmtree(cache)
    assert ranks.run(2, on_store, config, variables) == ["finished"] * 2
    for name, value in final(whole)["model"].items():
        torch.testing.assert_close(final(config)["model"][name], value, atol=1e-8, rtol=0)  # float64 over 8 steps of Adam


@pytest.mark.slow
@ON_BOTH_LONG
def test_nothing_is_lost_by_ctrl_c(bucket: ObjectServer, recipe: Path, tmp_path: Path) -> None:
    """The bucket has all that the ranks and the launcher wrote, and the same command resumes without the staging folder."""
    env = environment(**bucket.environment, CLAE_CACHE=str(tmp_path / "cache"))
    command = (*CLAE, "train", recipe, f"run_dir={bucket.url}", "--launcher", "local", "checkpoint.every_steps=0")
    with started(*command, env=env) as process:
        read_until(process, "step 2/")
        process.send_signal(signal.SIGINT)
        code, output = finish(process)
    assert code == STOPPED, output
    folder, copy = (
        RunFolder(tmp_path / "cache/runs" / bucket.scheme / BUCKET / "runs/first"),
        RunFolder(copy_folder(bucket.url)),
    )
    record = Record.of(copy.path)
    assert record is not None
    record.pull(TO_READ)
    for name in APPENDED:
        assert (copy.path / name).read_bytes() == (folder.path / name).read_bytes()
        assert (copy.path / name).stat().st_size > 0
    assert "saved. The same command resumes" in copy.console_file.read_text()
    shutil.rmtree(folder.path)
    with started(*command, env=env) as process:
        read_until(process, "resuming after step")
        process.send_signal(signal.SIGINT)
        assert finish(process)[0] == STOPPED


@pytest.mark.slow
def test_ray_on_one_machine(bucket: ObjectServer, recipe: Path, tmp_path: Path) -> None:
    """A STOP object ends the run for good, a signal to the launcher saves it; both resume from the bucket alone."""
    env = environment(**bucket.environment, CLAE_CACHE=str(tmp_path / "cache"))
    command = (
        *CLAE,
        "train",
        recipe,
        f"run_dir={bucket.url}",
        "--launcher",
        "ray",
        "checkpoint.every_steps=0",
        "train.epochs=1000",
    )
    for words in ("step 2/", "resuming after step"):
        with started(*command, env=env) as process:
            read_until(process, words)
            if words == "step 2/":
                bucket.write("runs/first/STOP", b"maintenance")
            else:
                process.send_signal(signal.SIGUSR1)
            code, output = finish(process)
        assert code == STOPPED, output
        assert f"({'maintenance' if words == 'step 2/' else 'SIGUSR1'}); saved. The same command resumes" in output
        assert "runs/first/STOP" not in bucket.names()
        shutil.rmtree(tmp_path / "cache" / "runs")
