"""Every accuracy has an interval, and kNN a K that fits its bank."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clae_dist.evaluation.evaluate import evaluate_run
from clae_dist.evaluation.interval import interval_text, wilson_interval
from clae_dist.evaluation.knn import usable_k
from clae_dist.evaluation.protocol import flat_metrics, headlines
from clae_dist.report.record import read_record, summarise, summary_table
from clae_dist.report.run_page import write_report

MakeRun = Callable[..., Path]


@pytest.mark.parametrize(
    ("percent", "num_images", "low", "high"),
    [  # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29; and 29 of 29 by symmetry
        (100 * 81 / 263, 263, 25.53, 36.62),
        (100 * 15 / 148, 148, 6.24, 16.05),
        (0.0, 20, 0.0, 16.11),
        (100 / 29, 29, 0.61, 17.18),
        (100.0, 20, 83.89, 100.0),
    ],
)
def test_wilson_intervals_of_the_literature(percent: float, num_images: int, low: float, high: float) -> None:
    assert wilson_interval(percent, num_images) == pytest.approx((low, high), abs=0.005)


def test_an_interval_covers_as_often_as_it_says() -> None:
    import numpy as np

    share, num_images = 0.43, 240
    draws = np.random.default_rng(0).binomial(num_images, share, 20_000)
    inside = [low <= 100 * share <= high for low, high in (wilson_interval(100 * d / num_images, num_images) for d in draws)]
    assert sum(inside) / len(inside) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(("k", "bank", "expected"), [(200, 240, 80), (200, 600, 200), (200, 50_000, 200), (5, 2, 1), (1, 1, 1)])
def test_k_is_at_most_a_third_of_the_bank(k: int, bank: int, expected: int) -> None:
    assert usable_k(k, bank) == expected


class Tables(HTMLParser):
    """The cells of a page's tables, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "br" and self._inside:
            self.rows[-1][-1] += "\n"
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self._inside = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


def test_every_accuracy_has_its_interval_wherever_it_is_said(make_run: MakeRun) -> None:
    run, said = make_run("evaluation.knn_k=200"), list[str]()
    found = evaluate_run(run, said.append)
    assert found["protocols"]["knn"]["settings"]["k"] == 50
    assert "evaluation.knn_k is 200, more than a third of the bank of 150 images: kNN uses K = 50." in said
    for kind in ("knn", "linear"):
        for headline in headlines(found["results"], kind).values():
            assert headline.interval == pytest.approx(wilson_interval(headline.value, 30), abs=1e-3)
    spoken = [line for line in said if "pretraining: " in line]
    assert len(spoken) == 4
    assert all("95 % interval" in line for line in spoken)
    report = write_report(run, lambda _: None).read_text()
    rows = {row[0]: row[1:] for row in Tables(report).rows}
    for kind, title in (("knn", "kNN"), ("linear", "linear probe")):
        for cell, headline in zip(rows[title], headlines(found["results"], kind).values(), strict=False):  # then chance
            assert cell == f"{headline.value:.2f} %\n{interval_text(headline.interval)}"
            assert max(map(len, cell.splitlines())) <= 12  # two such columns fit into 390 pixels
    assert "kNN uses K = 50." in report
    summary = json.loads((run / "summary.json").read_text())
    table = summary_table(summary)
    for kind in ("knn", "linear"):
        before, after = (interval_text(headline.interval) for headline in headlines(summary["results"], kind).values())
        assert f"{before} → {after}" in table


def test_a_protocol_that_this_version_does_not_know_is_shown_too(make_run: MakeRun) -> None:
    """Tables and report loop over evaluation.json; its accuracy has no interval here, and one value is no percentage."""
    run = make_run()
    found = evaluate_run(run, lambda _: None)
    found["protocols"]["new"] = {"title": "<new>", "description": "a probe & more", "settings": {}}
    found["results"]["new"] = {"accuracy": {"before": 12.5, "after": 25.0}, "layers": {"before": 300.0, "after": 400.0}}
    (run / "evaluation.json").write_text(json.dumps(found))
    assert "<new>, before → after" in summary_table(summarise(read_record(run)))
    page = write_report(run, lambda _: None).read_text()
    rows = {row[0]: row[1:] for row in Tables(page).rows}
    assert rows["<new>"] == ["12.50 %", "25.00 %", "33.33 %"]
    assert rows["layers"] == ["300", "400"]
    assert "a probe &amp; more" in page
    assert flat_metrics(found["results"])["new_layers_after"] == 400


def test_an_evaluation_of_an_older_version_has_a_way_out(make_run: MakeRun) -> None:
    run = make_run()
    (run / "evaluation.json").write_text(json.dumps({"images_seen": 224, "knn_before": 12.5, "knn_after": 25.0}))
    record = read_record(run)
    assert record.evaluation is None
    assert "(format 1, this version reads 2)" in record.ignored[0]
    assert f"`clae evaluate {run}` writes it again" in record.ignored[0]
