"""Commands that read a run in a bucket, from a machine that has not trained it."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from clae_dist.cli import main
from clae_dist.data.manifest import Manifest
from clae_dist.errors import BAD_CONFIG, STORAGE, ConfigError
from clae_dist.launchers import evaluate
from clae_dist.recipe import Recipe
from clae_dist.runs import copies
from clae_dist.runs.claim import open_run_folder
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.record import Record
from clae_dist.staging import copy_folder, staging_folder
from clae_dist.training.finish import Request
from clae_dist.world import World
from tests.checkpoints import tensors, write_checkpoint
from tests.object_server import BUCKET, ON_BOTH, ON_GOOGLE, ObjectServer
from tests.small_run import train_quietly, whole_run


def clae(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = main([str(word) for word in words])
    return code, capsys.readouterr().out


@ON_BOTH
def test_checkpoints_and_runs_are_listed(
    bucket: ObjectServer, shards: Manifest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without a checkpoint's tensors on this machine, unless they are verified; a damaged one is named."""
    url, runs = bucket.url, f"{bucket.scheme}://{BUCKET}/runs"
    config = replace(whole_run(shards, tmp_path), run_dir=url)
    open_run_folder(Recipe(config), shards, World.single("cpu"), "key1")
    RunFolder(config.folder).metrics_file.write_text('{"images_seen": 48, "step": 2, "epoch": 0.5, "loss": 5.5}\n')
    record = Record.of(staging_folder(url))
    assert record is not None
    record.push()
    for step in (1, 2):
        write_checkpoint(config.folder, step, tensors(step))
    code, text = clae(capsys, "checkpoints", url, "--json")
    assert code == 0
    assert [(line["step"], line["path"]) for line in json.loads(text)] == [
        (step, f"{url}/checkpoints/step-0000000{step}") for step in (2, 1)
    ]
    assert list(copy_folder(url).rglob("rank-*")) == []
    assert clae(capsys, "checkpoints", url, "--verify")[0] == 0
    (key,) = (name for name in bucket.names("runs/first/checkpoints/step-00000002.") if name.endswith("safetensors"))
    bucket.write(key, b"short")
    shutil.rmtree(copy_folder(url))
    code, text = clae(capsys, "checkpoints", url, "--verify")
    assert code == 1
    assert "damaged: rank-00000.safetensors has 5 bytes in the bucket" in text

    (run,) = json.loads(clae(capsys, "runs", runs, "--json")[1])
    assert (run["folder"], run["state"], run["step"], run["metrics"]) == (url, "stopped", 2, {"loss": 5.5})
    bucket.write("runs/first/training.lease", b'{"held by": "another host"}')
    (run,) = json.loads(clae(capsys, "runs", runs, "--json")[1])
    assert run["state"] == "running"
    bucket.clear()
    assert "no run folders" in clae(capsys, "runs", runs)[1]


def test_a_url_without_a_run_is_named(bucket: ObjectServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", bucket.url]) == 2
    assert f"RUN is '{bucket.url}', which holds no config.yaml" in capsys.readouterr().err


@ON_GOOGLE
@pytest.mark.parametrize("command", ["status", "checkpoints", "runs"])
def test_a_store_that_does_not_answer_is_named_soon(
    command: str, bucket: ObjectServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not after the minutes that a training run waits for it."""
    monkeypatch.setattr(copies, "FIRST_TRIES_S", 0.2)
    bucket.faults.choose = lambda request: "reset"
    assert main([command, bucket.url]) == STORAGE
    assert f"{bucket.url} cannot be used: " in capsys.readouterr().err


def test_an_evaluation_on_several_hosts_needs_a_folder_that_they_share(
    bucket: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Ray's cluster before anything is started, of torchrun's ranks by all of them together."""
    request = Request(str(copy_folder(bucket.url)))
    several = replace(World.single("cpu"), size=2)
    monkeypatch.setattr(evaluate, "connect", lambda *_: nullcontext(several))
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    words = f"SUBJECT is '{bucket.url}', whose copies several hosts do not share"
    with pytest.raises(ConfigError, match=re.escape(words)):
        evaluate.evaluate_on(request, "ray", 2)
    ending = evaluate.rank(request)
    assert ending.code == BAD_CONFIG
    assert words in ending.message


@pytest.mark.slow
@ON_BOTH
def test_results_of_a_run_are_written_to_the_bucket(
    bucket: ObjectServer, shards: Manifest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """evaluate, report, export, embed and compare, by URL."""
    url = bucket.url
    config = replace(whole_run(shards, tmp_path, epochs=1), run_dir=url)
    assert train_quietly(World.single("cpu"), config) == "finished"
    shutil.rmtree(tmp_path / "cache")
    assert clae(capsys, "evaluate", url, "--suite", "knn", "--device", "cpu", "--workers", "1")[0] == 0
    assert "knn" in json.loads(bucket.read("runs/first/evaluation.json"))["results"]
    assert "runs/first/evaluation.lease" not in bucket.names()
    code, text = clae(capsys, "report", url)
    assert code == 0
    assert f"sent to {url}" in text
    assert json.loads(bucket.read("runs/first/summary.json"))["images_seen"] == 96
    assert bucket.read("runs/first/report/report.html").startswith(b"<!doctype html>")
    assert clae(capsys, "export", url)[0] == 0
    assert json.loads(bucket.read("runs/first/export/config.json"))["images_seen"] == 96
    shutil.rmtree(tmp_path / "cache")
    for encoder in (url, f"{url}/export"):
        assert clae(capsys, "embed", encoder, shards.folder, "--to", tmp_path / "x.npy", "--device", "cpu")[0] == 0
        assert (tmp_path / "x.npy").stat().st_size > 100 * 16
        (tmp_path / "x.npy").unlink()
    other = replace(config, run_dir=f"{bucket.scheme}://{BUCKET}/runs/second")
    assert train_quietly(World.single("cpu"), other) == "finished"
    assert clae(capsys, "report", other.run_dir)[0] == 0
    code, text = clae(capsys, "compare", url, other.run_dir)
    assert code == 0
    assert "knn" in text.lower()
