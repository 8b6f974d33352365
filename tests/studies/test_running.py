"""How cells are run: side by side, past a failure, until a stop request; and how many fit on a Ray cluster."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from clae_dist.cli import main
from clae_dist.config import Batch, Config, Launch
from clae_dist.errors import STOPPED
from clae_dist.launchers import ray as ray_launcher
from clae_dist.runs.folder import RunFolder
from clae_dist.studies import running
from clae_dist.studies.cells import plan_cells
from clae_dist.studies.study import read_study
from tests.studies.conftest import STUDY, WriteStudy

ONE_SEED = STUDY.replace("seeds: [0, 1]", "seeds: [0]")


@pytest.mark.parametrize(
    ("resources", "settings", "expected"),
    [
        ({"CPU": 12.0}, {"workers": 2}, 6),
        ({"CPU": 13.0}, {"workers": 4}, 3),
        ({"CPU": 2.0}, {"workers": 4}, 1),  # Ray waits for hosts that are still to join
        ({"CPU": 64.0, "GPU": 8.0}, {"workers": 2}, 4),
        ({"CPU": 64.0, "GPU": 8.0}, {"workers": 2, "device": "cpu"}, 32),
    ],
)
def test_runs_that_fit_on_a_cluster(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], settings: dict[str, object], expected: int
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    cluster = SimpleNamespace(cluster_resources=lambda: resources, shutdown=lambda: None)
    monkeypatch.setattr(ray_launcher, "import_ray", lambda: cluster)
    monkeypatch.setattr(ray_launcher, "start_ray", lambda *_, **__: None)
    config = Config(launch=Launch(launcher="ray", **settings), batch=Batch(global_size=24))  # type: ignore[arg-type]
    assert running.cells_at_once(config) == expected
    monkeypatch.delenv("RAY_ADDRESS")
    assert running.cells_at_once(config) == 1
    assert running.cells_at_once(Config(launch=Launch(launcher="local"))) == 1


def spans(path: Path) -> tuple[float, float]:
    """Start and end of a run's training."""
    lines = [json.loads(line) for line in RunFolder(path).goodput_file.read_text().splitlines()]
    return lines[0]["at"], lines[-1]["at"]


@pytest.mark.slow
def test_equal_seconds_at_the_measured_speed(write_study: WriteStudy, tmp_path: Path) -> None:
    path = write_study(ONE_SEED.replace("passes: 1000", "seconds: 3"))
    assert main(["study", str(path), "--dry-run"]) == 2  # not measured yet
    assert main(["study", str(path), "--measure"]) == 0
    study = read_study(path)
    speeds = running.read_speeds(study)
    assert speeds is not None
    for cell in plan_cells(study, speeds).cells:
        seconds = cell.steps * 24 / speeds[cell.method]
        assert seconds <= 3 < seconds + 24 / speeds[cell.method]
    assert main(["study", str(path), "--dry-run"]) == 0


@pytest.mark.slow
def test_cells_side_by_side(write_study: WriteStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "cells_at_once", lambda _: 2)
    assert main(["study", str(write_study(ONE_SEED.replace("1000", "20000")))]) == 0
    (begun, ended), (other_begun, other_ended) = (spans(tmp_path / "study" / name / "seed-0") for name in ("simclr", "clae"))
    assert begun < other_ended
    assert other_begun < ended


@pytest.mark.slow
def test_a_failed_cell_does_not_keep_others_from_running(
    write_study: WriteStudy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "simclr").write_text("in the way")
    path = write_study(ONE_SEED)
    assert main(["study", str(path)]) == 2
    output = capfd.readouterr().out
    assert "cell 0 (simclr, seed 0) failed with exit code 2; other cells continue" in output
    assert "1 of 2 cells finished" in output
    (tmp_path / "study" / "simclr").unlink()
    assert main(["study", str(path)]) == 0


@pytest.mark.slow
def test_a_stop_request_is_passed_on(write_study: WriteStudy, tmp_path: Path) -> None:
    """SIGTERM to the study: the running cell saves, the study exits with the code that asks to be started again."""
    path = write_study(ONE_SEED.replace("1000", "1e6"))
    first = RunFolder(tmp_path / "study" / "simclr" / "seed-0")
    process = subprocess.Popen([sys.executable, "-m", "clae_dist", "study", str(path)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not first.find_checkpoints():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for _ in range(2):  # `timeout` sends it to the process and to its group
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == STOPPED
    finally:
        process.kill()
        process.wait()
    assert "stopped after step" in first.console_file.read_text()
    assert not any(cell.done for cell in plan_cells(read_study(path)).cells)
