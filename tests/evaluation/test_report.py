from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clae_dist.cli import main
from clae_dist.config import Attack
from clae_dist.errors import ConfigError
from clae_dist.evaluation import metrics as metrics_of_runs
from clae_dist.evaluation.evaluate import evaluate_run
from clae_dist.models import build_model
from clae_dist.reading import parse_line
from clae_dist.recipe import resolve
from clae_dist.report.attacked import amplification, attack_images
from clae_dist.report.curves import CHARTS
from clae_dist.report.record import read_record, summarise, summary_table
from clae_dist.report.run_page import write_report
from clae_dist.training.finish import report

MakeRun = Callable[..., Path]
Metrics = list[dict[str, float]]
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what the page refers to and what it says."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(path.read_text())
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[Image.Image]:
        prefix = "data:image/png;base64,"
        assert all(reference.startswith(prefix) for reference in self.references)
        found = [Image.open(io.BytesIO(base64.b64decode(reference.removeprefix(prefix)))) for reference in self.references]
        for image in found:
            image.load()
        return found


def test_the_whole_report(make_run: MakeRun, write_metrics: Callable[[Path], None]) -> None:
    run = make_run()
    write_metrics(run)
    evaluate_run(run, _quiet)
    path = write_report(run, _quiet)
    assert path == run / "report" / "report.html"
    page = Page(path)
    assert len(page.pictures()) == len(CHARTS) + 2
    names = {png.stem for png in (run / "report").glob("*.png")}
    assert names == {chart.name for chart in CHARTS} | {"adversarial", "neighbours"}
    assert "tiny <run>" in page.text  # a name is text, never markup
    for text in (
        "CLAE",
        "all 30 test images",
        "in a bank of 150 train images",
        "ddp over gloo",
        "linear probe",
        "untrained",
        "command line",
        "manifest digest",
        "data.shards"[5:],
    ):
        assert text in page.text, text
    assert not any(address in path.read_text() for address in ("http:", "https:", "@import", "url("))


def test_of_a_key_logged_twice_the_last_value_wins(make_run: MakeRun, write_metrics: Callable[[Path], None]) -> None:
    run = make_run()
    write_metrics(run)
    record = read_record(run)
    assert record.metrics.series("loss") == ([32, 64, 96, 128, 160, 192, 224], [9, 9, 3, 4, 5, 6, 7])
    # The kNN line of image 224 repeats it, and takes nothing away from the training line.
    assert record.metrics.series("knn_accuracy") == ([0, 224], [40, 55])
    summary = summarise(record)
    assert (summary["loss"], summary["images_seen"], summary["images_per_s"]) == (7, 224, 6)
    assert summary["wall_s"] == 7.75  # time_s counts on over restarts
    assert (summary["world_size"], summary["backend"], summary["collectives"]) == (2, "ddp", "gloo")


def test_what_is_missing_is_said(make_run: MakeRun) -> None:
    run = make_run(checkpoint=False)
    page = Page(write_report(run, _quiet))
    assert page.pictures() == []
    for text in ("no metrics yet", "has not been evaluated yet", "holds no checkpoint yet", "come with an evaluation"):
        assert text in page.text, text
    summary = json.loads((run / "summary.json").read_text())
    expected = dict.fromkeys(("images_seen", "images_per_s", "loss", "wall_s"))
    assert {**expected, "results": {}}.items() <= summary.items()
    assert "–" in summary_table(summary)


def test_a_line_that_is_still_being_written_is_left_out(make_run: MakeRun, write_metrics: Callable[[Path], None]) -> None:
    run = make_run(checkpoint=False)
    write_metrics(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"images_seen": 256, "los')
    assert summarise(read_record(run))["images_seen"] == 224


def test_what_is_damaged_is_ignored_and_said(make_run: MakeRun, write_metrics: Callable[[Path], None]) -> None:
    """A report is drawn of what can be read; each file that cannot has a line that says so."""
    run = make_run()
    write_metrics(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"images_s\n[]\n{"images_seen": -1}\n{"images_seen": "3"}\n{"images_seen": 1e400, "loss": 3}\n')
        file.write(
            '{"images_seen": 256, "loss": "low", "grad_norm": NaN, "alignment": 1e999, "x": {}}\n{"images_seen": 288, "lo'
        )
    (run / "goodput.jsonl").write_text(
        '{"event": "start", "at": 1}\n{"event": "resume", "at": 2, "step": 0, "spent": {"starting": 1}}\n'
        '{"event": "mark", "at": 3, "step": 2, "spent": {"sleeping": 1}}\n{"event": "mark", "at": "3", "step": 2}\n'
    )
    (run / "evaluation.json").write_text('{"format": 2, "images_seen": 224}')
    said: list[str] = []
    page = Page(write_report(run, said.append))
    assert f"{run}/metrics.jsonl: 5 lines that are cut off or damaged are ignored." in said
    assert any("goodput.jsonl: 2 lines that are cut off or damaged are ignored" in line for line in said)
    assert any("(num_classes is missing) and is ignored; `clae evaluate" in line for line in said)
    assert "has not been evaluated yet" in page.text
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["images_seen"], summary["loss"]) == (256, 7)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"run_key": 3}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_run_json_has_a_way_out(make_run: MakeRun, content: bytes) -> None:
    run = make_run(checkpoint=False)
    (run / "run.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"run.json is damaged \(.*\); restore it from a copy, or delete it"):
        write_report(run, _quiet)


def test_a_long_log_costs_no_more_than_its_part(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By counting: lines that are parsed, points that are kept. Lines of other kinds and the last ones are all read."""
    monkeypatch.setattr(metrics_of_runs, "MOST_LINES", 500)
    monkeypatch.setattr(metrics_of_runs, "MOST_POINTS", 64)
    parsed: list[bytes] = []

    def parse(line: bytes) -> Any:
        parsed.append(line)
        return parse_line(line)

    monkeypatch.setattr(metrics_of_runs, "parse_line", parse)
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for n in range(1, 20_001):
            file.write(json.dumps({"images_seen": n, "loss": 2 + n % 7, "images_per_s": 10.0 + n % 3}) + "\n")
            if n % 4000 == 0:
                file.write(json.dumps({"images_seen": n, "knn_accuracy": n / 400}) + "\n")
    read, notes = metrics_of_runs.read_metrics(path)
    assert len(parsed) < 1000
    assert max(len(curve.x) for curve in (*read.curves.values(), read.rates)) < 128
    assert read.series("knn_accuracy") == ([4000, 8000, 12000, 16000, 20000], [10, 20, 30, 40, 50])
    assert (read.images_seen, read.last("loss")) == (20_000, 3)
    assert "lines of training is used" in notes[0]


def test_a_thinned_curve_keeps_its_spikes_and_its_restarts() -> None:
    curve = metrics_of_runs.Curve()
    for n in range(100_000):
        curve.add(n, {50_000: 99.0, 70_001: -99.0, 80_000: float("nan")}.get(n, n % 10))
    assert len(curve.x) < 2 * metrics_of_runs.MOST_POINTS
    assert (max(y for y in curve.y if y == y), list(curve.x) == sorted(curve.x)) == (99, True)
    curve.cut(60_000)
    assert curve.x[-1] < 60_000
    curve.add(60_000, 1.0)
    assert curve.x[-1] == 60_000
    even = metrics_of_runs.Curve(extremes=False)
    for n in range(100_000):
        even.add(n, n % 1000)
    assert sorted(even.y)[len(even.y) // 2] == pytest.approx(500, abs=20)


def test_shards_that_have_moved_are_no_obstacle(
    make_run: MakeRun, write_metrics: Callable[[Path], None], tmp_path: Path
) -> None:
    run = make_run(data=tmp_path / "gone")
    write_metrics(run)
    page = Page(write_report(run, _quiet))
    assert len(page.pictures()) == len(CHARTS)
    assert "not where config.yaml says" in page.text


def test_plain_simclr_is_shown_under_the_default_attack(make_run: MakeRun) -> None:
    page = Page(write_report(make_run("method.name=simclr"), _quiet))
    assert "SimCLR" in page.text
    assert "the default attack, because this run has none" in page.text
    assert len(page.pictures()) == 1


def test_pictures_of_an_earlier_report_are_taken_away(make_run: MakeRun, write_metrics: Callable[[Path], None]) -> None:
    run = make_run(checkpoint=False)
    write_metrics(run)
    write_report(run, _quiet)
    (run / "metrics.jsonl").unlink()
    write_report(run, _quiet)
    assert list((run / "report").iterdir()) == [run / "report" / "report.html"]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        write_report(tmp_path, _quiet)


@pytest.mark.parametrize(
    "overrides",
    [
        ["attack.epsilon=0.02"],
        ["attack.epsilon=0.1", "attack.unit=normalised", "model.std=[0.2,0.2,0.2]"],
        ["method.anchor=other"],
    ],
)
def test_the_pictured_attack_keeps_to_epsilon_and_raises_the_loss(overrides: list[str]) -> None:
    config = resolve(None, ["model.encoder=small_resnet", "data.image_size=16", *overrides])[0]
    model = build_model(config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randint(0, 256, (48, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = attack_images(config, model, images)
    epsilon = 0.02 if config.attack.epsilon in (0.02, 0.1) else Attack().epsilon
    largest = (found.adversarial - found.clean).abs().max()
    assert float(largest) == pytest.approx(epsilon, abs=1e-6)  # float32 pixels
    assert found.adversarial.min() >= 0
    assert found.adversarial.max() <= 1
    assert found.loss_after > found.loss_before
    assert amplification(found) == int(1 / 3 / float(largest))
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_table_puts_two_runs_side_by_side() -> None:
    clae: dict[str, Any] = {
        "method": "CLAE",
        "images_seen": 512000,
        "images_per_s": 312.4,
        "loss": 4.5678,
        "results": {
            "knn": {"accuracy": {"before": 31.23, "after": 43.21}},
            "linear": {"accuracy": {"before": 38.0, "after": 55.55}},
        },
        "titles": {"knn": "kNN", "linear": "linear probe"},
        "wall_s": 100.2,
        "report": "runs/a/report/report.html",
        "checkpoints": "runs/a/checkpoints",
    }
    alone = summary_table(clae)
    for text in (
        "512,000",
        "312",
        "4.568",
        "31.2 % → 43.2 %",
        "38.0 % → 55.5 %",
        "runs/a/report/report.html",
        "runs/a/checkpoints",
    ):
        assert text in alone, text
    both = summary_table(clae, {**clae, "method": "SimCLR", "results": {}, "report": "runs/b/report/report.html"})
    header, *_ = both.splitlines()
    assert header.split() == ["CLAE", "SimCLR"]
    assert "runs/b/report/report.html" in both
    columns = [line for line in both.splitlines() if line.startswith(("images seen", "loss"))]
    assert len({len(line) for line in columns}) == 1  # aligned


def test_every_run_of_a_comparison_has_a_head_of_its_own(make_run: MakeRun, tmp_path: Path) -> None:
    """Two runs of one method had the same head, and of two `--compare` the first was lost."""
    clae = {"method": "CLAE", "name": "first", "run_dir": "runs/a"}
    other = {**clae, "name": "second", "run_dir": "runs/b"}

    def head(*runs: dict[str, str]) -> list[str]:
        return summary_table(*runs).splitlines()[0].split()

    assert head(clae, other, {**clae, "name": "third"}) == ["first", "second", "third"]
    assert head(clae, {**other, "name": "first"}) == ["a", "b"]
    assert head(clae, {**other, "name": "first", "run_dir": "elsewhere/a"}) == ["runs/a", "elsewhere/a"]
    assert head(clae) == ["CLAE"]
    runs = [make_run(f"name={name}", checkpoint=False, run_dir=tmp_path / name) for name in ("one", "two", "three")]
    said: list[str] = []
    for run in runs:
        report(run, say=said.append)
    assert main(["report", str(runs[0]), "--compare", str(runs[1]), "--compare", str(runs[2])]) == 0
    report(runs[0], runs[1:], say=said.append)
    assert ["one", "two", "three"] in [line.split() for line in said]
    with pytest.raises(ConfigError, match="is in the table already"):
        report(runs[0], [tmp_path / "two" / ".." / "one"], say=said.append)


def _quiet(_: str) -> None: ...


def test_where_the_time_went_is_in_report_and_summary(make_run: MakeRun) -> None:
    run = make_run()
    lines = [
        {"event": "start", "at": 0.0},
        {"event": "resume", "at": 10.0, "step": 0, "spent": {"starting": 10.0}},
        {"event": "end", "at": 100.0, "step": 9, "spent": {"starting": 10.0, "training": 80.0, "data": 10.0}},
    ]
    (run / "goodput.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "sta')
    page = write_report(run).read_text()
    assert "Where the time went" in page
    assert "Of 100 s since the first start, over 1 start." in page
    assert "80.0 %" in page
    found = json.loads((run / "summary.json").read_text())["goodput"]
    assert (found["wall_s"], found["training_share"], found["data_share"], found["lost_share"]) == (100, 80, 10, 0)
