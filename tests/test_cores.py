"""Cores, threads and loader processes of a machine's ranks; versions of packages; trials with few rows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clae_dist import cores
from clae_dist.config import Batch, Config, Data
from clae_dist.versions import package_version


@pytest.mark.parametrize(
    ("usable", "ranks", "threads", "processes"),
    [(1, 1, 1, 0), (2, 1, 2, 1), (2, 4, 1, 0), (16, 2, 8, 7), (96, 8, 12, 11), (192, 8, 24, 16)],
)
def test_cores_are_divided_among_ranks(
    monkeypatch: pytest.MonkeyPatch, usable: int, ranks: int, threads: int, processes: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)))
    monkeypatch.setattr(cores, "cpu_quota", lambda cgroup: None)
    assert (cores.threads_per_rank(ranks), cores.loader_processes(ranks)) == (threads, processes)


@pytest.mark.parametrize(("limit", "expected"), [("max 100000", 8), ("350000 100000", 3), ("50000 100000", 1)])
def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, expected: int) -> None:
    """Docker's --cpus and Kubernetes' limits leave the affinity mask as it is."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(limit)
    assert cores.usable_cores(tmp_path) == expected


def test_versions_without_importing_the_package() -> None:
    assert package_version("torch").startswith("2.")
    assert package_version("clae-no-such-package") == ""


@pytest.mark.parametrize(("micro_size", "expected"), [(0, 0), (64, 2)])
def test_few_rows_keep_the_kind_of_step(micro_size: int, expected: int) -> None:
    few = Config(batch=Batch(global_size=256, micro_size=micro_size), data=Data(streams=64)).with_few_rows(4, 3)
    assert (few.batch.global_size, few.batch.micro_size, few.rows_per_rank(3)) == (12, expected, 4)
