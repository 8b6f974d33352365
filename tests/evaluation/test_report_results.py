"""Curves and results of protocols on the report: pictures, tables of all metrics, and files that are damaged or hostile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clae_dist.evaluation.stored import read_evaluation
from clae_dist.report.curves import CHARTS, draw_chart
from clae_dist.report.figures import Picture, png
from clae_dist.report.record import read_record
from clae_dist.report.result_pictures import DRAWINGS, ProtocolResult, _against_epsilon, _bins
from clae_dist.report.results import result_sections
from clae_dist.report.run_page import write_report
from tests.evaluation.test_interval import Tables
from tests.run_files import DETAILS, HISTOGRAM, KINDS, RESULTS, ROBUST_RESULTS, both, evaluation

MakeRun = Callable[..., Path]


NUM_PICTURES = 1 + 2 + 2 + 1


class Reader(Tables):
    """Texts, rows of tables, tags and alternative texts of a page."""

    def __init__(self, page: str) -> None:
        self.text, self.alts, self.tags = "", list[str](), set[str]()
        super().__init__(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        super().handle_starttag(tag, attrs)
        self.tags.add(tag)
        if tag == "img":
            self.alts.append(dict(attrs).get("alt") or "")

    def handle_data(self, data: str) -> None:
        super().handle_data(data)
        self.text += data


def _page(run: Path, content: dict[str, Any]) -> Reader:
    (run / "evaluation.json").write_text(json.dumps(content))
    return Reader(write_report(run, lambda _: None).read_text())


def test_every_protocol_has_its_pictures_and_all_of_its_metrics(make_run: MakeRun) -> None:
    run = make_run(checkpoint=False)
    page = _page(run, evaluation())
    assert len(page.alts) == NUM_PICTURES
    assert all(len(alt) > 30 for alt in page.alts)
    assert (
        "Line chart: untrained 30.0 % at ε = 0, 20.0 % at ε = 2, 3.0 % at ε = 8, 2.0 % at ε = 16; pretrained 45.0"
        in page.alts[0]
    )
    names = {path.stem for path in (run / "report").glob("*.png")}
    assert names == {"robust-1", "calibration-1", "calibration-2", "corruptions-1", "corruptions-2", "ood-1"}
    assert ["slf pgd at 2", "20\n18.0 – 22.0", "31\n29.0 – 33.0"] in page.rows
    assert ["layers", "300", "12,345"] in page.rows
    assert ["<new> title", "12.50 %", "25.00 %", "33.33 %"] in page.rows
    for text in ("a probe of new & more", "may be masked", "At ε = 8/255: FGSM 14.0 %, AutoAttack 9.0 %", "pretrained 87.0 %"):
        assert text in page.text, text
    assert not page.tags & {"script", "new", "link"}


def test_pictures_are_of_what_is_there_and_earlier_ones_are_removed(make_run: MakeRun) -> None:
    run = make_run(checkpoint=False)
    assert len(_page(run, evaluation()).alts) == NUM_PICTURES
    page = _page(run, evaluation({"new": RESULTS["new"], "calibration": RESULTS["calibration"]}, {}))
    assert (page.alts, list((run / "report").glob("*.png"))) == ([], [])
    only_after = {"corruptions": {"after": KINDS}, "ood": {"before": HISTOGRAM}}
    assert len(_page(run, evaluation(details=only_after)).alts) == 1 + 1  # robust, and corruptions after


def test_results_of_a_set_without_labels_are_shown(make_run: MakeRun) -> None:
    """evaluation.json of such a set was refused as damaged: it has results, and no classes."""
    run = make_run(checkpoint=False)
    unlabelled = {**evaluation({"new": RESULTS["new"]}, {}), "num_classes": 0, "no_accuracies": "no image has a label"}
    page = _page(run, unlabelled)
    assert ["layers", "300", "12,345"] in page.rows
    assert "There are no accuracies: no image has a label." in page.text


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("calibration", "images", [0, 40]),
        ("calibration", "images", [-1, 40, 60]),
        ("calibration", "images", [1e99, 40, 60]),
        ("calibration", "confidence", [0, 0.5, 90.0]),
        ("calibration", "accuracy", []),
        ("corruptions", "fog", []),
        ("corruptions", "fog", [50.0]),
        ("corruptions", "fog", [50.0, 1e99]),
        ("corruptions", "fog", [50.0] * 99),
        ("ood", "far_knn_edges", [0.0, 0.0, 1.0]),
        ("ood", "far_knn_edges", [1.0, 0.5, 0.0]),
        ("ood", "far_knn_edges", [-1e99, 0.5, 1e99]),
        ("ood", "far_knn_edges", [0.5]),
        ("ood", "far_knn_inside", [0.5]),
        ("ood", "far_knn_outside", [-0.5, 1.5]),
    ],
)
def test_values_that_cannot_be_meant_are_not_drawn(name: str, key: str, values: list[float]) -> None:
    details = {when: {k: v for k, v in DETAILS[name][when].items() if not k.startswith("scaled_")} for when in DETAILS[name]}
    damaged = {when: {**one, key: values} for when, one in details.items()}
    assert len(list(DRAWINGS[name](ProtocolResult(name, "", {}, details)))) > 0
    assert list(DRAWINGS[name](ProtocolResult(name, "", {}, damaged))) == []


def test_details_without_a_picture_are_reported() -> None:
    (_, section) = result_sections(evaluation(details={"ood": both({}, {"a": [1.0]})}))
    assert (section.figures, section.note) == (
        (),
        "The values of its pictures in evaluation.json cannot be drawn; evaluate again.",
    )


@pytest.mark.parametrize("epsilon", [None, "8", -1.0, 0, 1e99, [1]])
def test_a_strange_epsilon_leaves_the_rest_of_the_curve(epsilon: Any) -> None:
    strange = {**ROBUST_RESULTS, "slf_pgd_at_99999": both(1.0, 1.0), "slf_pgd_at_x": both(1.0, 1.0), "_clean": both(1e99, -5.0)}
    strange["slf_pgd_at_4"] = both(400.0, 20.0)
    (drawing,) = DRAWINGS["robust"](ProtocolResult("robust", "", strange, settings={"epsilon": epsilon}))
    assert "untrained 30.0 % at ε = 0, 20.0 % at ε = 2, 2.0 % at ε = 16" in drawing.alt
    assert [line.get_label() for line in drawing.figure.axes[0].get_lines()] == ["untrained, PGD", "pretrained, PGD"]
    assert png(drawing.figure, dpi=20)


@pytest.mark.parametrize(
    "details", [[], {"ood": []}, {"ood": {"after": []}}, {"ood": {"after": {"a": ["1"]}}}, {"o": {"a": 1}}]
)
def test_details_of_another_type_are_refused(tmp_path: Path, details: Any) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({**evaluation(), "details": details}))
    content, problem = read_evaluation(path)
    assert content is None
    assert "details" in problem


def test_names_in_a_file_of_others_are_text_and_lead_nowhere(make_run: MakeRun) -> None:
    run = make_run(checkpoint=False)
    hostile = "../../../<script>$\\frac{\x1b[2J"
    histogram = {f"{hostile}_{part}": HISTOGRAM[f"far_knn_{part}"] for part in ("edges", "inside", "outside")}
    kinds = {hostile: [1.0, 2.0], "$x_$": [3.0, 4.0]}
    before = set(run.parent.rglob("*"))
    page = _page(run, evaluation(details={"ood": {"after": histogram}, "corruptions": {"after": kinds}}))
    new = {path.relative_to(run).as_posix() for path in {*run.parent.rglob("*")} - before}
    pictures = {f"report/{name}-1.png" for name in ("robust", "corruptions", "ood")}
    assert new - {"evaluation.json", "summary.json"} == {"report", "report/report.html", *pictures}
    assert "script" not in page.tags
    assert "../../../<script>$\\frac{\\x1b[2J" in page.text


def test_points_are_in_order_and_small_bins_are_dropped() -> None:
    result = ProtocolResult(
        "robust", "", ROBUST_RESULTS, {"after": {"images": [9, 10], "confidence": [0.1, 0.9], "accuracy": [1, 0.5]}}
    )
    points = list(_against_epsilon(result, "slf", "after", 8.0))
    assert points == [(0, 45, 43, 47), (2, 31, 29, 33), (8, 10, 8, 12), (16, 4, 2, 6)]
    np.testing.assert_allclose(_bins(result, "after", ""), [[10, 90, 50]])


def test_single_steps_are_drawn_beside_means_that_differ_from_them(make_run: MakeRun) -> None:
    chart = next(chart for chart in CHARTS if chart.name == "loss")
    run = make_run(checkpoint=False)

    def drawn(**values: float) -> Picture:
        lines = [{"images_seen": 32 * n, **{key: value * n for key, value in values.items()}} for n in range(1, 5)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        picture = draw_chart(read_record(run), chart)
        assert picture is not None
        return picture

    means, both = drawn(loss_clean=1.0), drawn(loss_clean=1.0, loss_clean_step=1.25)
    assert both.png != means.png
    assert both.alt == means.alt == "Line chart over images seen: clean from 1 to 4."  # a mean is the value that counts
    assert drawn(loss_clean=1.0, loss_clean_step=1.0).png == means.png  # one step a line: the mean is the step
    assert drawn(loss_clean_step=1.0).png == means.png
    assert drawn(loss=2.0, loss_three_views=2.0).alt.endswith("all terms from 2 to 8.")  # a method with terms of its own
    assert drawn(loss=2.0, loss_clean=1.0).png == means.png


def test_a_linear_probe_is_drawn_beside_the_knn(make_run: MakeRun) -> None:
    chart, run = next(chart for chart in CHARTS if chart.name == "knn"), make_run(checkpoint=False)
    lines = [{"images_seen": 32 * n, "knn_accuracy": 30.0 + n, "linear_accuracy": 40.0 + n} for n in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = draw_chart(read_record(run), chart)
    assert picture is not None
    assert picture.alt == "Line chart over images seen: kNN from 30 to 32; linear probe from 40 to 42."
