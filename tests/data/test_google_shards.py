"""Shards in Google's storage, by the real client (gcsfs) before an emulator."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from clae_dist.data import byte_streams
from clae_dist.data.manifest import Manifest
from clae_dist.errors import DataError
from tests.data.test_remote import assert_same, batches, settings
from tests.fault_proxy import Request
from tests.object_server import BUCKET, ObjectServer

pytestmark = pytest.mark.parametrize("bucket", ["gs"], indirect=True)
URL = f"gs://{BUCKET}/set"


@pytest.fixture(autouse=True)
def _filled(bucket: ObjectServer, shards: Manifest) -> None:
    byte_streams._google.cache_clear()  # it has the environment of another test
    for path in shards.folder.iterdir():
        bucket.write(f"set/{path.name}", path.read_bytes())


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_epoch_under_faults_is_the_local_one(workers: int, bucket: ObjectServer, shards: Manifest, tmp_path: Path) -> None:
    """Also in a loader process: answers that are refused for now, cut or lost."""
    kinds = ["503", "429", "cut", "reset"]

    def choose(request: Request) -> str:
        return kinds[request.number // 6 % 4] if request.number % 6 == 2 else ""

    bucket.faults.choose = choose
    found = batches(settings(URL, tmp_path / "cache", workers=workers))
    assert_same(found, batches(settings(str(shards.folder), tmp_path / "none")))
    assert {request.action for request in bucket.faults.requests} >= {"head", "get"}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("denied", "does not have storage.objects.create access"),
        ("anonymous", "Anonymous caller does not have"),
        ("", "it does not exist"),
    ],
)
def test_what_a_retry_cannot_fix_is_named_at_once(
    fault: str, words: str, bucket: ObjectServer, shards: Manifest, tmp_path: Path
) -> None:
    bucket.faults.choose = lambda request: fault
    with pytest.raises(DataError, match=f"manifest.json could not be fetched from gs://.*: .*{words}"):
        batches(settings(URL if fault else "gs://no-such-bucket/set", tmp_path / "cache", retries=8))
    assert len(bucket.faults.requests) <= 4


def test_a_file_without_credentials_is_named(bucket: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    with pytest.raises(DataError, match=r"Google's default credentials cannot be used \(File .*absent.json was not found"):
        batches(settings(URL, tmp_path / "cache", retries=8))
