"""Whole runs on shards from elsewhere: the same weights as from the disk, and failures that reach every rank."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.config import Batch, Checkpointing, Config, Data, Train
from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import DataError
from clae_dist.recipe import Recipe
from clae_dist.runs.checkpoint import load_checkpoint
from clae_dist.training.train import train
from clae_dist.world import World
from tests import processes
from tests.http_faults import Fault, serve
from tests.ranks import RankPool
from tests.small_run import small_run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("data") / "shards", 48, 16, num_shards=4)


def recipe(shards: str, run_dir: Path, **data: Any) -> Config:
    return small_run(
        shards,
        run_dir,
        data=Data(shards=shards, image_size=16, workers=0, timeout_s=1.0, cache=str(run_dir.parent / "cache"), **data),
        batch=Batch(global_size=12),
        train=Train(epochs=2, precision="float32", knn_every=1, threads=1),
        checkpoint=Checkpointing(every_steps=4),
    )


def train_on(world: World, config: Config) -> str:
    console = io.StringIO()
    try:
        train(Recipe(config), world, console)
    except DataError as error:
        return str(error)
    return console.getvalue()


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(run_dir, lambda text: pytest.fail(text))
    assert checkpoint is not None
    return dict(checkpoint.state()["model"])


@pytest.mark.slow
def test_a_run_under_faults_ends_with_the_local_runs_weights(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    ranks.run(2, train_on, recipe(str(shards.folder), tmp_path / "local"))
    with serve(shards.folder) as server:
        server.choose = lambda name, number: [Fault("cut", 2000), Fault("wrong"), None][min(number, 2)]
        said = ranks.run(2, train_on, recipe(server.url, tmp_path / "http"))[0]
    assert f"data: noise, 8 shards at {server.url}; cache {tmp_path}/cache/shards (as much as the disk has)" in said
    found, wanted = weights(tmp_path / "http"), weights(tmp_path / "local")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    # The images are the same: a run that began there may go on here.
    assert "resuming after step 8" in ranks.run(2, train_on, recipe(str(shards.folder), tmp_path / "http"))[0]


def test_a_shard_that_cannot_be_had_ends_the_run_on_every_rank(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    with serve(shards.folder) as server:
        server.choose = lambda name, _: Fault("status", code=403) if name == "train-000002.tar" else None
        url = server.url.replace("://", "://me:hunter2@") + "/?sig=tok3n"
        said = ranks.run(2, train_on, recipe(url, tmp_path / "run"))
        assert said[0] == said[1]
        assert f"train-000002.tar could not be fetched from {server.url}/train-000002.tar?…: the server answered 403" in said[0]
    kept = " ".join(path.read_text() for path in (tmp_path / "run").iterdir() if path.is_file())
    assert not any(secret in kept + said[0] for secret in ("hunter2", "tok3n"))


@pytest.mark.slow
def test_the_command_trains_and_evaluates_from_http(shards: Manifest, tmp_path: Path) -> None:
    environment = processes.environment(XDG_CACHE_HOME=str(tmp_path / "home"))
    environment.pop("CLAE_CACHE", None)

    def clae(*arguments: object) -> None:
        done = processes.clae(*arguments, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr + done.stdout

    settings = ["data.image_size=16", "batch.global_size=12", "model.encoder=small_resnet", "train.epochs=2", "data.workers=1"]
    settings += ["optim.warmup_epochs=0", "tracking.name=none", "train.knn_every=0", "launch.workers=2", "run_dir=run"]
    (tmp_path / "recipe.yaml").write_text("name: remote\n")
    with serve(shards.folder) as server:
        clae("train", "recipe.yaml", f"data.shards={server.url}", *settings)
        assert {server.requests[f"train-{number:06d}.tar"] for number in range(4)} == {1}
        clae("evaluate", "run")
        found = json.loads((tmp_path / "run/evaluation.json").read_text())
        assert (found["manifest_digest"], found["test_images"]) == (shards.digest, 48)
    assert len(list((tmp_path / "home/clae-dist/shards").glob("*.tar"))) == 8
