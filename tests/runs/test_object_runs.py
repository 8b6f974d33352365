"""Run folders in a bucket: the record in parts, one writer, and errors before ranks start."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clae_dist import lease, object_store
from clae_dist.cli import main
from clae_dist.errors import STORAGE
from clae_dist.object_store import StoreError, check_store, store_of
from clae_dist.runs import mirror, record
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.record import TO_RESUME, Record
from clae_dist.staging import copy_folder, staging_folder
from clae_dist.world import World
from tests.object_server import KEY_ID, ON_BOTH, SECRET, ObjectServer


@pytest.fixture
def run_dir(bucket: ObjectServer) -> Path:
    folder = staging_folder(bucket.url)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: first\n")
    return folder


def record_of(folder: Path) -> Record:
    found = Record.of(folder)
    assert found is not None
    return found


def pulled(bucket: ObjectServer) -> Path:
    """The record as another machine gets it."""
    copy = copy_folder(bucket.url)
    shutil.rmtree(copy, ignore_errors=True)
    record_of(copy).pull(TO_RESUME)
    return copy


# ---- the record ----


@ON_BOTH
def test_a_file_that_grows_is_sent_in_parts_and_joined(
    bucket: ObjectServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Appended to, cut, rewritten, and with more parts than one file keeps: the copy is the file after every step."""
    monkeypatch.setattr(record, "_MOST_PARTS", 4)
    ours, path, sizes = record_of(run_dir), RunFolder(run_dir).metrics_file, []
    lines = [f'{{"images_seen": {i}}}\n' for i in range(8)]
    contents = ["".join(lines[:i]) for i in range(1, 8)] + ["".join(lines[:2]), "".join(lines[:1] + lines[3:]), "x\n"]
    for content in contents:
        path.write_text(content)
        assert ours.push() == (["metrics.jsonl", "config.yaml"] if content is contents[0] else ["metrics.jsonl"])
        sizes.append(sum("metrics.jsonl" in name for name in bucket.names()))
        assert RunFolder(pulled(bucket)).metrics_file.read_text() == content
        assert ours.push() == []
    assert sizes == [1, 2, 3, 4, 1, 2, 3, 1, 1, 1]


@ON_BOTH
def test_lines_that_a_kill_left_unsent_are_kept_and_sent(bucket: ObjectServer, run_dir: Path) -> None:
    path = RunFolder(run_dir).metrics_file
    path.write_text("one\n")
    record_of(run_dir).push()
    path.write_text("one\ntwo\n")
    later = record_of(run_dir)
    later.pull(TO_RESUME)
    assert path.read_text() == "one\ntwo\n"
    later.push()
    assert RunFolder(pulled(bucket)).metrics_file.read_text() == "one\ntwo\n"


def test_lines_that_were_written_again_are_kept_if_nobody_else_has_gone_on(bucket: ObjectServer, run_dir: Path) -> None:
    """The resumed run had cut its file at a checkpoint, and was killed before it sent anything of what followed."""
    path = RunFolder(run_dir).metrics_file
    path.write_text("1\n2\n3\n")
    record_of(run_dir).push()
    path.write_text("1\n2 again\n3 again\n4\n")
    later = record_of(run_dir)
    later.pull(TO_RESUME)
    assert path.read_text() == "1\n2 again\n3 again\n4\n"
    later.push()
    other = pulled(bucket)
    assert RunFolder(other).metrics_file.read_text() == path.read_text()
    RunFolder(other).metrics_file.write_text("1\nof another node\n")
    record_of(other).push()
    path.write_text("1\n2 once more\n")
    record_of(run_dir).pull(TO_RESUME)
    assert path.read_text() == "1\nof another node\n"


@ON_BOTH
def test_a_node_that_was_away_takes_what_another_has_written(bucket: ObjectServer, run_dir: Path) -> None:
    folder = RunFolder(run_dir)
    folder.metrics_file.write_text("one\ntwo\n")
    folder.bad_samples_file.write_text("old")
    record_of(run_dir).push()
    other = pulled(bucket)
    RunFolder(other).metrics_file.write_text("one\nother\n")
    RunFolder(other).bad_samples_file.unlink()
    record_of(other).push()
    bucket.delete("runs/first/bad-samples.jsonl")
    record_of(run_dir).pull(TO_RESUME)
    assert folder.metrics_file.read_text() == "one\nother\n"
    assert not folder.bad_samples_file.exists()


@ON_BOTH
def test_a_run_that_was_deleted_from_the_bucket_leaves_no_stale_files(bucket: ObjectServer, run_dir: Path) -> None:
    RunFolder(run_dir).identity_file.write_text("{}")
    record_of(run_dir).push()
    bucket.clear()
    record_of(run_dir).pull(TO_RESUME)
    assert list(run_dir.iterdir()) == []


@ON_BOTH
def test_a_launcher_sends_only_ends(bucket: ObjectServer, run_dir: Path) -> None:
    """The lines that ranks wrote before they were killed; nothing from a folder that another run or node has left behind."""
    folder = RunFolder(run_dir)
    folder.identity_file.write_text("{}")
    folder.metrics_file.write_text("one\n")
    record_of(run_dir).push()
    folder.metrics_file.write_text("one\ntwo\n")
    folder.error_log(1).write_text("Traceback")
    record_of(run_dir).push_ends()
    assert RunFolder(pulled(bucket)).metrics_file.read_text() == "one\ntwo\n"
    assert bucket.read("runs/first/error-rank-1.log") == b"Traceback"
    folder.metrics_file.write_text("stale\n")
    record_of(run_dir).push_ends()
    assert RunFolder(pulled(bucket)).metrics_file.read_text() == "one\ntwo\n"


@ON_BOTH
def test_an_object_named_stop_stops_the_run(bucket: ObjectServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of an earlier start does not, which the launcher deletes."""
    monkeypatch.setattr(mirror, "EVERY_S", 0.05)
    bucket.write("runs/first/STOP", b"old")
    record_of(run_dir).push()
    stop = RunFolder(run_dir).stop_file
    mirror.forget_stop(run_dir)
    assert "runs/first/STOP" not in bucket.names()
    with mirror.mirrored(run_dir, World.single("cpu"), pytest.fail) as running:
        running.share()
        bucket.write("runs/first/STOP", b"maintenance")
        while not (stop.exists() and stop.read_text() == "maintenance"):
            time.sleep(0.02)  # the test's limit ends a thread that never asks


# ---- one writer ----


class InUse(Exception):
    pass


@contextmanager
def held(run_dir: Path, monkeypatch: pytest.MonkeyPatch, machine: str = "") -> Iterator[None]:
    """The lease of another process, which changes it every 0.1 s; as if on another machine, if one is named."""
    for name, value in (("BEAT_S", 0.1), ("EXPIRY_S", 1.5), ("_POLL_S", 0.05)):
        monkeypatch.setattr(lease, name, value)
    with monkeypatch.context() as patch:
        if machine:
            patch.setattr(lease, "_machine", lambda: machine)
        with lease.hold(RunFolder(run_dir).training_lease, "clae train", InUse, ""):
            patch.undo()
            yield


def take(run_dir: Path) -> None:
    with lease.hold(RunFolder(run_dir).training_lease, "clae train", InUse, "wait for it.", wait_s=0.2):
        pass


@ON_BOTH
@pytest.mark.parametrize("machine", ["", "another"])
def test_a_second_writer_is_refused(machine: str, bucket: ObjectServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(run_dir, monkeypatch, machine), pytest.raises(InUse, match=rf"{bucket.url} is in use by clae train on host"):
        take(run_dir)
    take(run_dir)
    assert "runs/first/training.lease" not in bucket.names()


@ON_BOTH
def test_the_lease_of_a_dead_process_of_another_machine_is_taken_over(
    bucket: ObjectServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks are not compared: the holder says that it began in the year 2400."""
    with held(run_dir, monkeypatch, "another"):
        content = json.loads(bucket.read("runs/first/training.lease"))
    bucket.write("runs/first/training.lease", json.dumps({**content, "since": 13_569_465_600.0}).encode())
    take(run_dir)


@ON_BOTH
def test_one_of_many_creates_an_object(bucket: ObjectServer, run_dir: Path) -> None:
    """Also where the store carried out what its answer did not reach us about."""
    bucket.faults.choose = lambda request: "lost" if request.action == "put" and request.number % 2 else ""
    store, won = store_of(run_dir), []
    assert store is not None

    def create(name: bytes) -> None:
        if store.create("one", name):
            won.append(name)

    threads = [threading.Thread(target=create, args=(str(i).encode(),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [store.get("one")]


# ---- what cannot be used ----


@pytest.mark.parametrize(
    ("bucket", "fault", "words"),
    [
        ("s3", "", "no-such-bucket/run cannot be used: there is no such bucket; create it"),
        ("s3", "AccessDenied", "cannot be used: access is denied (AccessDenied); allow getting, putting"),
        ("s3", "InvalidAccessKeyId", "the credentials are not accepted (InvalidAccessKeyId); set AWS_PROFILE"),
        ("s3", "SignatureDoesNotMatch", "the credentials are not accepted (SignatureDoesNotMatch); set AWS_PROFILE"),
        ("s3", "RequestTimeTooSkewed", "refuses requests of this machine's clock (RequestTimeTooSkewed); set the clock (NTP)"),
        ("s3", "500", "cannot be used: "),
        ("gs", "", "no-such-bucket/run cannot be used: there is no such bucket; create it"),
        ("gs", "denied", "cannot be used: access is denied (403 storage.objects.create); allow getting, putting"),
        ("gs", "anonymous", "there are no credentials; set GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs", "requester pays", "the requester pays for this bucket; name your project in FSSPEC_GS_REQUESTER_PAYS"),
        ("gs", "invalid", "The specified bucket name is invalid.); correct the name"),
        ("gs", "503", "We encountered an internal error. Please try again., 503; check the network and STORAGE_EMULATOR_HOST"),
    ],
    indirect=["bucket"],
)
def test_a_store_that_cannot_be_used_is_named_before_ranks_start(
    fault: str,
    words: str,
    bucket: ObjectServer,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = bucket.url if fault else f"{bucket.scheme}://no-such-bucket/run"
    monkeypatch.setattr(object_store, "FIRST_TRIES_S", 0.2)
    bucket.faults.choose = lambda request: fault if request.action == "put" else ""
    assert main(["train", str(recipe), f"run_dir={url}", "--launcher", "local"]) == STORAGE
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert words in line
    assert SECRET not in line
    assert KEY_ID not in line


def test_missing_credentials_are_named(bucket: ObjectServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(StoreError, match="there are no credentials; set AWS_PROFILE"):
        check_store(run_dir)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"s3://{KEY_ID}:{SECRET}@bucket/run", "holds credentials; leave them out"),
        ("https://host/run", "a URL that is not one of s3://, gs://"),
        ("s3:///run", "names no folder in a bucket"),
        ("s3://bucket/../run", "names no folder in a bucket"),
    ],
)
def test_urls_that_are_no_folder_are_refused(url: str, words: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), f"run_dir={url}", "--launcher", "local"]) == 2
    text = capsys.readouterr().err
    assert words in text
    assert SECRET not in text
