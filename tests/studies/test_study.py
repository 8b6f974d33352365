"""Studies that run: cells, resuming after a kill, selection, and the results in every form."""

from __future__ import annotations

import csv
import json
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from clae_dist.cli import main
from clae_dist.errors import ConfigError
from clae_dist.evaluation.interval import student_t
from clae_dist.runs.folder import RunFolder
from clae_dist.studies.cells import Cell, StudyPlan, plan_cells
from clae_dist.studies.report import latex, write_study_report
from clae_dist.studies.results import read_results, tabulate
from clae_dist.studies.study import read_study
from tests.evaluation.test_report import Page
from tests.studies.conftest import STUDY, WriteStudy

SCORES = {("simclr", 0): 40.0, ("simclr", 1): 42.0, ("clae", 0): 41.5, ("clae", 1): 44.5}


def finish(cell: Cell, digest: str, score: float) -> None:
    """The files of a finished cell that a study reads."""
    folder = RunFolder(cell.folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    identity = {"package_version": "1", "git_revision": "", "manifest_digest": digest, "world_size": 1, "backend": "ddp"}
    folder.identity_file.write_text(json.dumps({**identity, "collectives": "gloo", "run_key": "a1", "started": 1.0}))
    lines = [{"step": step, "images_seen": 24 * step, "knn_accuracy": score - 5 + step, "time_s": 2.0} for step in (1, 2, 3)]
    folder.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {"knn": {"accuracy": {"before": 20.0, "after": score}}}
    evaluation = {
        "format": 2,
        "results": results,
        "protocols": {
            "knn": {"title": "kNN <b>", "description": "", "settings": {}},
            "linear": {"title": "linear probe", "description": "", "settings": {}},
        },
        "train_images": 100,
        "bank_images": 100,
        "test_images": 100,
        "num_classes": 2,
        "images_seen": 24 * cell.steps,
        "step": cell.steps,
        "manifest_digest": digest,
        "neighbours": [],
    }
    folder.evaluation_file.write_text(json.dumps(evaluation))


@pytest.fixture
def plan(write_study: WriteStudy) -> StudyPlan:
    return plan_cells(read_study(write_study()))


@pytest.fixture
def finished(plan: StudyPlan) -> StudyPlan:
    for cell in plan.cells:
        finish(cell, plan.manifest.digest, SCORES[cell.method, cell.seed])
    return plan


def test_means_and_paired_differences(finished: StudyPlan) -> None:
    """With two seeds, half of the interval is t · |a - b| / 2 with t = tan(0.95 · pi / 2) = 12.706."""
    (table,) = tabulate(finished, read_results(finished))
    simclr, clae = table.rows
    assert (simclr.mean.value, clae.mean.value) == (41.0, 43.0)
    assert simclr.mean.half == pytest.approx(12.706205 * 1.0, rel=1e-6)
    assert simclr.difference is None
    assert clae.difference is not None
    assert clae.difference.value == 2.0
    assert clae.difference.half == pytest.approx(12.706205 * 0.5, rel=1e-6)  # of +1.5 and +2.5: seeds cancel
    assert clae.verdict == ""


def test_a_difference_is_of_the_seeds_that_both_have(finished: StudyPlan) -> None:
    RunFolder(
        next(cell.folder for cell in finished.cells if (cell.method, cell.seed) == ("simclr", 0))
    ).evaluation_file.unlink()
    (table,) = tabulate(finished, read_results(finished))
    difference = table.rows[1].difference
    assert difference is not None
    assert (difference.value, difference.half, difference.num) == (2.5, None, 1)


def test_cells_of_another_set_are_refused(finished: StudyPlan) -> None:
    finish(finished.cells[1], "f" * 64, 50.0)
    with pytest.raises(ConfigError, match="cells of a study share one set"):
        read_results(finished)


def test_the_files_of_a_report(finished: StudyPlan) -> None:
    lines = "\n".join(write_study_report(finished))
    assert "4 cells, all finished" in lines
    assert "43.00 ± 19.06  n=2" in lines
    folder = finished.study.folder
    page = Page(folder / "study.html")
    assert "kNN <b>" in page.text  # escaped
    assert len(page.pictures()) == 1
    assert "Student’s t" in page.text
    table = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [row["method"] for row in table] == ["simclr", "clae"]
    assert float(table[1]["difference"]) == 2.0
    assert float(table[1]["low"]) == pytest.approx(43 - 12.706205 * 1.5, rel=1e-6)
    cells = list(csv.DictReader((folder / "cells.csv").read_text().splitlines()))
    assert {(row["method"], int(row["seed"])): float(row["after"]) for row in cells} == SCORES
    assert {float(row["encoder_passes"]) for row in cells} == {864, 792}
    assert r"clae & $43.00 \pm 19.06$" in (folder / "table.tex").read_text()


def test_latex_escapes_names(finished: StudyPlan) -> None:
    (table,) = tabulate(finished, read_results(finished))
    assert r"50 \% of\_x" in latex([replace(table, title="50 % of_x")])


def test_curves_are_over_encoder_passes(finished: StudyPlan) -> None:
    for result in read_results(finished):
        units = 6 if result.cell.method == "simclr" else 11
        assert list(result.curve[0]) == [24 * units * step for step in (1, 2, 3)]


def test_a_partial_study_reports_what_is_there(plan: StudyPlan) -> None:
    assert "0 of 4 cells finished" in "\n".join(write_study_report(plan))
    finish(plan.cells[0], plan.manifest.digest, 40.0)
    lines = "\n".join(write_study_report(plan))
    assert "1 of 4 cells finished: the results are preliminary" in lines
    assert "40.00" in lines


def test_student_t_against_closed_forms_and_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert student_t(0.5, 1) == pytest.approx(1.0, rel=1e-12)  # Cauchy: tan(pi / 4)
    assert student_t(0.95, 2) == pytest.approx(0.95 * (2 / (1 - 0.95**2)) ** 0.5, rel=1e-12)
    for degrees in (1, 2, 3, 4, 5, 9, 10, 30, 101):
        assert student_t(0.95, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)


@pytest.mark.slow
def test_selection_takes_the_best_on_the_train_split_and_reads_no_test_image(write_study: WriteStudy) -> None:
    grid = STUDY.replace("{set: {method.name: clae}}", "{set: {method.name: clae}, select: {attack.epsilon: [1/255, 8/255]}}")
    path = write_study(grid.replace("[0, 1]", "[0]"))
    study = read_study(path)
    assert main(["study", str(path)]) == 0
    plan = plan_cells(study)
    scores = [cell.score() or 0.0 for cell in plan.of("select")]
    best = plan.of("select")[scores.index(max(scores))]
    assert all(cell.chosen == best.chosen for cell in plan.of("compare") if cell.method == "clae")
    assert all(cell.done for cell in plan.cells)
    for cell in plan.of("select"):
        assert not RunFolder(cell.folder).evaluation_file.exists()
        assert "knn" not in RunFolder(cell.folder).metrics_file.read_text()


@pytest.mark.slow
def test_after_a_kill_the_same_command_continues_the_study(write_study: WriteStudy, tmp_path: Path) -> None:
    """kill -9 of the study ends the running cell, too; afterwards no cell is trained twice and none is missing."""
    path = write_study(STUDY.replace("passes: 1000", "passes: 3000").replace("[0, 1]", "[0]"))
    command = [sys.executable, "-m", "clae_dist", "study", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first, second = tmp_path / "study" / "simclr" / "seed-0", tmp_path / "study" / "clae" / "seed-0"
    try:
        deadline = time.monotonic() + 120
        while not RunFolder(second).find_checkpoints():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    evaluated = (first / "evaluation.json").stat().st_mtime_ns
    assert main(["study", str(path)]) == 0
    assert (first / "evaluation.json").stat().st_mtime_ns == evaluated
    plan = plan_cells(read_study(path))
    assert all(cell.done for cell in plan.cells)
    assert RunFolder(second).goodput_file.read_text().count('"event": "start"') == 2
    assert len(read_results(plan)) == 2
    assert main(["study", str(path), "--report"]) == 0
    values = [result.headline("knn") for result in read_results(plan) if result.cell.method == "clae"]
    assert tabulate(plan, read_results(plan))[0].rows[1].mean.value == pytest.approx(statistics.fmean(filter(None, values)))


def test_one_cell_of_an_array(write_study: WriteStudy, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write_study()
    assert main(["study", str(path), "--count"]) == 0
    assert capsys.readouterr().out == "4\n"
    assert main(["study", str(path), "--cell", "4"]) == 2
    assert "cells 0 to 3" in capsys.readouterr().err
    assert main(["study", str(path), "--cell", "1"]) == 0
    assert (tmp_path / "study" / "clae" / "seed-0" / "evaluation.json").is_file()
    assert main(["study", str(path), "--cell", "1"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert main(["study", str(path), "--dry-run"]) == 0
    assert "4 cells, 1 finished" in capsys.readouterr().out
