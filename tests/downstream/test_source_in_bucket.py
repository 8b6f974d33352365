"""`clae finetune s3://…`: a source that this machine has not trained, on a server on loopback."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clae_dist.cli import main, parse
from clae_dist.commands.finetune import settings_of
from clae_dist.config import Config
from clae_dist.data.manifest import Manifest
from clae_dist.deploy.export import export_encoder
from clae_dist.deploy.initial import resolve
from clae_dist.errors import ConfigError
from clae_dist.recipe import from_yaml
from clae_dist.world import World
from tests.object_server import BUCKET, ObjectServer
from tests.small_run import Undisturbed, train_quietly, whole_run

URL = f"s3://{BUCKET}/runs/first"


def settings(*words: object) -> Config:
    return settings_of(parse(["finetune", *map(str, words)])).config


def test_an_export_in_a_bucket_is_a_source(
    bucket: ObjectServer, undisturbed: Undisturbed, shards: Manifest, tmp_path: Path
) -> None:
    """The recipe names the URL, so that any host can fetch the weights; an export that was replaced is fetched again."""
    shutil.copytree(undisturbed(1), tmp_path / "first")
    export = export_encoder(tmp_path / "first")
    for path in export.iterdir():
        bucket.write(f"runs/first/export/{path.name}", path.read_bytes())
    config = settings(f"{URL}/export", "finetune/classify", f"data.shards={shards.folder}")
    assert (config.name, config.model.encoder, config.data.image_size) == ("first-classify", "small_resnet", 16)
    assert config.model.init == f"{URL}/export"
    local = settings(export, "finetune/classify", f"data.shards={shards.folder}")
    shutil.rmtree(tmp_path / "cache")  # the rank that opens the run is on another host
    found, expected = resolve(config), resolve(local)
    assert (found.digest, found.source) == (expected.digest, f"{URL}/export")
    assert all(torch.equal(value, expected.weights[name]) for name, value in found.weights.items())
    changed = json.loads((export / "config.json").read_text())
    bucket.write("runs/first/export/config.json", json.dumps({**changed, "input_size": [3, 24, 24]}).encode())
    assert settings(f"{URL}/export", "finetune/classify", f"data.shards={shards.folder}").data.image_size == 24


def test_urls_that_are_no_source(bucket: ObjectServer, shards: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=f"SOURCE is '{URL}', which is no run .*, no exported encoder .* and no timm/NAME"):
        settings(URL, "finetune/classify", f"data.shards={shards.folder}")
    config = settings("timm/resnet18", "finetune/classify", f"data.shards={shards.folder}")
    nowhere = replace(config, model=replace(config.model, init=URL))
    with pytest.raises(ConfigError, match=f"RUN_OR_EXPORT is '{URL}', which holds neither a run's config.yaml"):
        resolve(nowhere)
    with pytest.raises(SystemExit):
        main(["finetune", "ftp://host/run", "finetune/classify"])
    assert "a URL that is not one of s3://" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_in_a_bucket_is_fine_tuned(
    bucket: ObjectServer, shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a machine without a copy: the command, the weights that the new run began with, and its record of the source."""
    assert train_quietly(World.single("cpu"), replace(whole_run(shards, tmp_path, epochs=1), run_dir=URL)) == "finished"
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    words = ["train.epochs=1", "train.knn_every=0", "batch.global_size=24", "data.workers=0", "tracking.name=none"]
    assert main(["finetune", URL, "finetune/classify", *words, "launch.launcher=local", "launch.workers=1"]) == 0
    run = tmp_path / "runs" / "first-classify"
    assert from_yaml(run / "config.yaml").model.init == URL
    assert json.loads((run / "run.json").read_text())["initial"]["source"] == URL
    initial = json.loads((run / "initial" / "initial.json").read_text())
    assert not initial["missing"]
    assert not initial["other_shape"]
    assert "runs/first/training.lease" not in bucket.names()
