"""metrics.jsonl survives a kill at any byte, and a continued run does not double its lines."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clae_dist.tracking import MetricsFile


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_on_disk_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0, print)
    file.log({"step": 1, "loss": 2.5}, images_seen=64)
    assert lines(tmp_path / "metrics.jsonl") == [{"images_seen": 64, "step": 1, "loss": 2.5}]
    file.close("finished")


@pytest.mark.parametrize("torn", ['{"images_seen": 192, "lo', '{"images_seen": 192}', '{"loss": 1}\n', "\x00\x00\x00\n"])
def test_a_line_cut_off_by_a_kill_is_taken_away(tmp_path: Path, torn: str) -> None:
    path, said = tmp_path / "metrics.jsonl", []
    path.write_text('{"images_seen": 64, "loss": 3.0}\n{"images_seen": 128, "loss": 2.0}\n' + torn)
    file = MetricsFile(path, 1000, said.append)
    file.log({"loss": 1.0}, images_seen=192)
    file.close("finished")
    assert [line["images_seen"] for line in lines(path)] == [64, 128, 192]
    assert said == ["metrics.jsonl: removed 1 line (1 of them cut off); the run resumes at image 1000"]


def test_lines_after_the_checkpoint_are_not_doubled_by_the_replay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"images_seen": {64 * step}, "loss": {step}}}\n' for step in range(1, 6)))
    file = MetricsFile(path, 3 * 64, print)
    file.log({"loss": 4}, images_seen=4 * 64)
    file.close("finished")
    assert lines(path) == [{"images_seen": 64 * step, "loss": step} for step in range(1, 5)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_killed_before_its_first_checkpoint_logs_its_start_once(tmp_path: Path) -> None:
    """kNN at step 0 is logged at 0 images, which is where the next start begins, too: it was there twice."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"images_seen": 0, "knn_accuracy": 30.0}\n{"images_seen": 64, "loss": 3.0}\n')
    file = MetricsFile(path, 0, print)
    file.log({"knn_accuracy": 31.0}, images_seen=0)
    file.close("finished")
    assert lines(path) == [{"images_seen": 0, "knn_accuracy": 31.0}]


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """A disk that is full, as far as a file of this process is concerned."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_no_line_and_no_run(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, said.append)
    with largest_file(100):
        for step in range(1, 6):
            file.log({"step": step, "loss": 1.25}, 256 * step)
        whole = path.read_bytes()
        assert (whole.endswith(b"}\n"), len(whole) <= 100) == (True, True)  # never half a line
        assert len(said) == 1
        assert "metrics.jsonl cannot be written (" in said[0]
    file.log({"step": 6, "loss": 1.25}, 256 * 6)
    file.close("finished")
    assert [row.images_seen for row in file.rows()] == [256 * step for step in range(1, 7)]
    assert said[1:] == [f"{path} can be written again and has all metrics."]


def test_lines_that_a_full_disk_never_took_are_counted(tmp_path: Path) -> None:
    said: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", 0, said.append)
    with largest_file(10):
        file.log({"step": 1}, 256)
        file.log({"step": 2}, 512)
        file.close("finished")
    assert "its last 2 lines are missing" in said[-1]
