"""Checkpoints in a bucket: committed by the index, read piece by piece, skipped when torn, deleted index first."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clae_dist import google_storage, object_store
from clae_dist.errors import CheckpointError, ConfigError
from clae_dist.runs.checkpoint import Checkpoint, load_checkpoint, remove_leftovers
from clae_dist.runs.checkpoint.objects import publish_checkpoints, stage_checkpoints
from clae_dist.runs.folder import RunFolder
from clae_dist.staging import copy_folder, staging_folder, url_of
from tests.checkpoints import assert_same, tensors, write_checkpoint
from tests.fault_proxy import Request
from tests.object_server import ON_BOTH, ObjectServer

KEY = "runs/first/checkpoints"


@pytest.fixture
def run_dir(bucket: ObjectServer) -> Path:
    return staging_folder(bucket.url)


def elsewhere(bucket: ObjectServer) -> Path:
    """The run as a machine sees it that has staged nothing."""
    copy = copy_folder(bucket.url)
    shutil.rmtree(copy, ignore_errors=True)
    return copy


def files(bucket: ObjectServer, step: int) -> dict[str, str]:
    """The keys of a checkpoint by the names of its files."""
    return {key.rpartition("/")[2]: key for key in bucket.names(f"{KEY}/step-{step:08d}.")}


def test_paths_and_urls_name_each_other(bucket: ObjectServer, tmp_path: Path) -> None:
    for folder in (staging_folder, copy_folder):
        assert url_of(folder("s3://b1//x/y/")) == "s3://b1/x/y"
        assert url_of(folder("gs://b1/x") / "checkpoints") == "gs://b1/x/checkpoints"
    assert staging_folder(bucket.url) != copy_folder(bucket.url)
    assert not any(map(url_of, (tmp_path, tmp_path / "cache", tmp_path / "cache/runs", tmp_path / "cache/runs/s3")))


@ON_BOTH
def test_what_ranks_have_written_is_read_elsewhere(bucket: ObjectServer, run_dir: Path) -> None:
    write_checkpoint(run_dir, 7, tensors(7), size=3, sharded=True)
    assert set(files(bucket, 7)) == {"checkpoint.json", *(f"rank-0000{rank}.safetensors" for rank in range(3))}
    checkpoint = load_checkpoint(elsewhere(bucket), pytest.fail)
    assert checkpoint is not None
    assert_same(checkpoint, tensors(7))


@ON_BOTH
def test_pieces_are_read_without_the_rest_of_their_files(bucket: ObjectServer, run_dir: Path) -> None:
    state = {"model/large": torch.arange(1_000_000.0), "model/small": torch.arange(8.0)}
    write_checkpoint(run_dir, 1, state)
    copy = elsewhere(bucket)
    stage_checkpoints(copy)
    checkpoint = Checkpoint(RunFolder(copy).checkpoint(1))
    bucket.faults.requests.clear()
    assert torch.equal(checkpoint["model/small"], state["model/small"])
    assert torch.equal(checkpoint["model/large"], state["model/large"])
    assert [path.name for path in checkpoint.path.glob("rank-*")] == []
    assert {request.action for request in bucket.faults.requests} == {"get"}


def flip(bucket: ObjectServer, key: str) -> None:
    data = bytearray(bucket.read(key))
    data[-1] ^= 1
    bucket.write(key, bytes(data))


@ON_BOTH
@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("rank-00001.safetensors", flip, "has sha256"),
        pytest.param(
            "rank-00000.safetensors",
            lambda bucket, key: bucket.write(key, bucket.read(key)[:-1]),
            "bytes in the bucket, expected",
            marks=pytest.mark.slow,
        ),
        ("rank-00001.safetensors", lambda bucket, key: bucket.delete(key), "is not in the bucket"),
        pytest.param("checkpoint.json", flip, "checkpoint.json: it is no checkpoint of ours", marks=pytest.mark.slow),
        ("checkpoint.json", lambda bucket, key: bucket.delete(key), ""),
    ],
    ids=["wrong byte", "short", "missing", "wrong index", "no index"],
)
def test_torn_checkpoints_are_skipped(
    file: str, damage: Callable[[ObjectServer, str], None], words: str, bucket: ObjectServer, run_dir: Path
) -> None:
    for step in (1, 2):
        write_checkpoint(run_dir, step, tensors(step), size=2, sharded=True)
    damage(bucket, files(bucket, 2)[file])
    said: list[str] = []
    checkpoint = load_checkpoint(elsewhere(bucket), said.append)
    assert checkpoint is not None
    assert_same(checkpoint, tensors(1))
    if words:
        (line,) = said
        assert line.startswith(f"{bucket.url}/checkpoints/step-00000002 is damaged: ")
        assert words in line
    else:  # never committed
        assert said == []


@ON_BOTH
def test_pieces_of_an_abandoned_start_do_not_touch_a_committed_checkpoint(bucket: ObjectServer, run_dir: Path) -> None:
    write_checkpoint(run_dir, 1, tensors(1))
    leftover = f"{KEY}/step-00000001.other/rank-00000.safetensors"
    bucket.write(leftover, b"late")
    checkpoint = load_checkpoint(elsewhere(bucket), pytest.fail)
    assert checkpoint is not None
    assert_same(checkpoint, tensors(1))
    remove_leftovers(run_dir)
    assert leftover not in bucket.names()
    assert len(files(bucket, 1)) == 2


@ON_BOTH
def test_old_checkpoints_are_deleted_index_first(bucket: ObjectServer, run_dir: Path) -> None:
    write_checkpoint(run_dir, 1, tensors(1), size=2)
    bucket.faults.requests.clear()
    write_checkpoint(run_dir, 2, tensors(2), size=2, keep=1)
    deleted = [request.key.rpartition("/")[2] for request in bucket.faults.requests if request.action == "delete"]
    puts = [request.key.rpartition("/")[2] for request in bucket.faults.requests if request.action == "put"]
    assert puts[-1].startswith("checkpoint.json")
    old = [name for name in deleted if "rank" not in name or "safetensors" in name]
    assert old[0].startswith("checkpoint.json")
    assert len(old) == 3
    assert files(bucket, 1) == {}
    assert [path.name for path in RunFolder(run_dir).find_checkpoints()] == ["step-00000002"]


@ON_BOTH
def test_a_damaged_checkpoint_that_is_written_again_is_replaced(bucket: ObjectServer, run_dir: Path) -> None:
    write_checkpoint(run_dir, 1, tensors(1))
    flip(bucket, files(bucket, 1)["rank-00000.safetensors"])
    write_checkpoint(run_dir, 1, tensors(2), attempt="attempt1")
    assert len(files(bucket, 1)) == 2
    checkpoint = load_checkpoint(elsewhere(bucket), pytest.fail)
    assert checkpoint is not None
    assert_same(checkpoint, tensors(2))


@ON_BOTH
def test_a_checkpoint_that_was_copied_into_the_staging_folder_is_published(bucket: ObjectServer, run_dir: Path) -> None:
    """As an extended run does with its parent's."""
    path = write_checkpoint(run_dir.parent / "parent", 3, tensors(3), size=2, sharded=True)
    bucket.clear()
    shutil.copytree(path, run_dir / "checkpoints" / path.name, ignore=shutil.ignore_patterns("source"))
    publish_checkpoints(run_dir)
    checkpoint = load_checkpoint(elsewhere(bucket), pytest.fail)
    assert checkpoint is not None
    assert_same(checkpoint, tensors(3))


@ON_BOTH
def test_errors_that_pass_are_retried(bucket: ObjectServer, run_dir: Path) -> None:
    """Every third request fails in one of six ways."""
    kinds = ["500", "503", "429", "cut", "lost", "reset"]

    def choose(request: Request) -> str:
        return kinds[request.number // 3 % 6] if request.number % 3 == 0 else ""

    bucket.faults.choose = choose
    for step in (1, 2):
        write_checkpoint(run_dir, step, tensors(step), size=2, sharded=True, keep=1)
    checkpoint = load_checkpoint(elsewhere(bucket), pytest.fail)
    assert checkpoint is not None
    assert_same(checkpoint, tensors(2))
    bucket.faults.choose = lambda request: ""
    assert files(bucket, 1) == {}


@ON_BOTH
def test_an_outage_is_not_taken_for_damage(bucket: ObjectServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        write_checkpoint(run_dir, step, tensors(step))
    monkeypatch.setattr(object_store, "RETRY_S", 0.3)
    bucket.faults.choose = lambda request: "503" if "rank-" in request.key else ""
    with pytest.raises(
        CheckpointError, match=rf"{bucket.url}/checkpoints/step-00000002.attempt0/rank-00000.safetensors cannot be used"
    ):
        load_checkpoint(elsewhere(bucket), pytest.fail)


def test_a_client_that_is_not_installed_is_named(bucket: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    google_storage._client_class.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    with pytest.raises(ConfigError, match="gs:// URL, which needs a package that is not installed; pip install gcsfs"):
        object_store.check_store(staging_folder("gs://bucket-1/run"))
