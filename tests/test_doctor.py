"""`clae doctor` on this machine, and on machines that have something wrong."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from clae_dist import doctor
from clae_dist.config import Batch, Config, Data, Tracking
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.doctor import collectives, machine, software, stores
from clae_dist.doctor.collectives import sum_over_ranks
from clae_dist.doctor.finding import GIB, Finding
from clae_dist.errors import OK
from clae_dist.launchers import local
from clae_dist.launchers.rank import Ending
from tests.http_faults import serve
from tests.object_server import BUCKET, ObjectServer


def only(findings: Any) -> Finding:
    (finding,) = list(findings)
    return finding


def test_a_machine_that_passes_the_tests_has_no_problem(tmp_path: Path) -> None:
    lines: list[str] = []
    config = Config(run_dir=str(tmp_path / "runs/run"), tracking=Tracking(name="none"))
    assert doctor.run_doctor(config, lines.append) == 0, "\n".join(lines)
    text = "\n".join(lines)
    assert re.search(r"ok        collectives +(gloo|nccl) on 2 ranks: sums are right, [\d.]+ ms a round trip", text)
    assert re.search(r"\d+ ok, \d+ warnings?, 0 problems", lines[-1])
    assert "data.shards is empty" in text


def test_a_problem_is_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "check", lambda: iter(()))
    config = Config(data=Data(shards=str(tmp_path / "nothing")), tracking=Tracking(name="none"))
    lines: list[str] = []
    assert doctor.run_doctor(config, lines.append) == 1
    assert any(line.startswith("problem   shards") for line in lines)


def test_a_missing_package_says_what_then_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("ray", "timm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.1.0+cu118" if name == "torch" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {finding.what: finding for finding in software.packages()}
    assert (found["ray"].level, found["timm"].level, found["torch"].level) == ("warning", "problem", "warning")
    assert "torchrun and local work without" in found["ray"].advice
    assert "pip install 'timm>=1.0'" in found["timm"].advice


def test_a_torchvision_of_another_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(software.importlib, "import_module", import_module)
    problems = [finding for finding in software.packages() if finding.level == "problem"]
    assert "cannot be imported (RuntimeError: operator torchvision::nms does not exist)" in problems[0].found


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({"cpu.max": "150000 100000\n", "memory.max": "2147483648\n"}, 1.5, 2 * GIB),
        ({"cpu.max": "max 100000\n", "memory.max": "max\n"}, None, None),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5, None),
        ({"cpu/cpu.cfs_quota_us": "-1", "memory/memory.limit_in_bytes": "9223372036854771712"}, None, None),
        ({}, None, None),
    ],
)
def test_cgroup_limits_of_both_versions(tmp_path: Path, files: dict[str, str], cores: Any, memory: Any) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.cpu_quota(tmp_path) == cores
    assert machine.memory_limit(tmp_path) == memory


def test_a_container_with_less_than_the_host_is_told(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000")
    (tmp_path / "memory.max").write_text(str(GIB))
    cpu, memory = machine.limits(tmp_path)
    assert (cpu.level, memory.level) == ("warning", "warning")
    assert "0.5 cores by cgroup" in cpu.found
    assert "raise the container's CPU limit" in cpu.advice


def test_small_shared_memory_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = machine.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage._replace(free=64 * 1024**2))
    finding = only(machine.shared_memory(tmp_path))
    assert finding.level == "warning"
    assert "--shm-size" in finding.advice
    assert "data.workers=0" in finding.advice


def test_few_open_files_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (1024, 1_048_576))
    assert "ulimit -n 4096" in only(machine.open_files()).advice


def test_a_clock_that_was_never_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.time, "time", lambda: 0.0)
    assert only(machine.clock()).level == "problem"


def hangs_on_rank_1(*arguments: Any) -> Ending:
    if os.environ["RANK"] == "1":
        time.sleep(60)
    return sum_over_ranks("cpu", 0.5)


def fails_on_rank_1(*arguments: Any) -> Ending:
    if os.environ["RANK"] == "1":
        os.environ["MASTER_PORT"] = "1"
    return sum_over_ranks("cpu", 0.5)


@pytest.mark.parametrize("work", [hangs_on_rank_1, fails_on_rank_1])
def test_ranks_that_hang_or_fail_are_ended_in_time(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "sum_over_ranks", work)
    monkeypatch.setattr(local, "_GRACE_S", 0.5)
    start = time.monotonic()
    finding = only(collectives.check())
    assert time.monotonic() - start < 30
    assert finding.level == "problem"
    assert re.search(r"a rank failed \(Dist\w+Error: .+\)", finding.found)
    assert "firewall" in finding.advice


def test_wrong_sums_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Ending(OK, json.dumps([[[3.0, 30.0], [2.0, 20.0]], 0.001]))
    monkeypatch.setattr(collectives, "spawn", lambda *arguments: wrong)
    assert "expected [3, 30]" in only(collectives.check()).found


@pytest.mark.parametrize(
    ("tracking", "level", "text"),
    [
        (Tracking(name="none"), "ok", "none"),
        (Tracking(uri="mlruns"), "problem", "sqlite:////path/to/mlflow.db"),
        (Tracking(uri="http://127.0.0.1:9"), "warning", "does not answer"),
        (Tracking(), "ok", "mlflow.db"),
    ],
)
def test_the_tracking_store(tmp_path: Path, tracking: Tracking, level: str, text: str) -> None:
    finding = only(stores.mlflow_store(Config(run_dir=str(tmp_path / "run"), tracking=tracking)))
    assert finding.level == level
    assert text in finding.found + finding.advice


def test_little_disk_is_a_problem_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = stores.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda path: usage._replace(free=100 * 1024**2))
    found = {finding.what: finding for finding in stores.disk(Config(run_dir=str(tmp_path)))}
    assert found["run folder"].level == "problem"
    assert "checkpoint.keep" in found["run folder"].advice


def test_shards_without_a_recipe_are_said_to_be_unchecked() -> None:
    assert "not checked" in only(stores.shards(None)).found


def test_shards_are_compared_with_the_manifest_and_the_batch(tmp_path: Path) -> None:
    write_synthetic_set(tmp_path / "set", num_images=8, image_size=32)

    def check(**batch: int) -> Finding:
        return only(stores.shards(Config(data=Data(shards=str(tmp_path / "set")), batch=Batch(**batch))))

    assert check(global_size=8).level == "ok"
    assert "8 images to train on, sizes match" in check(global_size=8).found
    assert check(global_size=16).found == "8 images, batch.global_size 16"
    with (tmp_path / "set/train-000000.tar").open("ab") as shard:
        shard.write(b"more")
    assert (check(global_size=8).level, "train-000000.tar" in check(global_size=8).found) == ("problem", True)


def test_shards_from_elsewhere_are_reached_and_their_cache_is_looked_at(tmp_path: Path) -> None:
    write_synthetic_set(tmp_path / "set", num_images=8, image_size=32)

    def check(shards: str, cache: Path = tmp_path / "cache", **data: Any) -> tuple[Finding, Finding]:
        config = Config(run_dir=str(tmp_path), data=Data(shards=shards, cache=str(cache), **data), batch=Batch(global_size=8))
        rooms = {finding.what: finding for finding in stores.disk(config)}
        return only(stores.shards(config)), rooms.get("shard cache", rooms["run folder"])

    with serve(tmp_path / "set") as server:
        found, room = check(server.url.replace("://", "://me:hunter2@"))
        assert (found.level, room.level, f"{server.url} answers" in found.found) == ("ok", "ok", True)
        assert set(server.requests) == {"manifest.json", "train-000000.index.npy"}
        assert "data.cache" in check(server.url, cache_bytes=10**18)[1].advice
        assert check(server.url + "/other")[0].level == "problem"
        found, _ = check(f"{server.url}/train-{{000000..000001}}.tar")
        assert (found.level, "2 plain shards without a manifest" in found.found) == ("warning", True)
        assert check(f"{server.url}/none.tar")[0].level == "problem"
    found, _ = check(server.url)
    assert (found.level, "manifest.json could not be fetched" in found.found) == ("problem", True)
    assert check(str(tmp_path / "set/train-000000.tar"))[0].level == "warning"
    assert check(str(tmp_path / "set/none.tar"))[0].level == "problem"


def test_the_sets_of_a_mixture_are_looked_at(tmp_path: Path) -> None:
    write_synthetic_set(tmp_path / "set", num_images=8, image_size=32)
    data = Data(shards=str(tmp_path / "set"), mixture={str(tmp_path / "set"): 0.25, str(tmp_path / "none"): 0.25})
    first, same, missing = stores.shards(Config(data=data, batch=Batch(global_size=8)))
    assert (first.level, same.level, missing.level) == ("ok", "ok", "problem")
    assert "0.25 of every batch" in same.found
    assert str(tmp_path / "none") in missing.found


def test_a_bucket_is_checked(bucket: ObjectServer) -> None:
    fine = only(stores.run_bucket(Config(run_dir=f"s3://{BUCKET}/run")))
    assert (fine.level, fine.found) == ("ok", f"s3://{BUCKET}/run can be written, listed and read")
    missing = only(stores.run_bucket(Config(run_dir="s3://no-such-bucket/run")))
    assert (missing.level, missing.advice) == ("problem", "create it, or correct run_dir.")
    assert list(stores.run_bucket(Config(run_dir="runs/run"))) == []
