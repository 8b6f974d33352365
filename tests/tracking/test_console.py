"""The lines a user reads while a run goes."""

from __future__ import annotations

import io

import pytest

from clae_dist.tracking.console import ConsoleTracker, StepLine, duration, read_line

METRICS = {
    "step": 120,
    "epoch": 2.31,
    "time_s": 60.0,
    "loss": 5.12344,
    "loss_clean": 5.0,
    "loss_adversarial": 5.2,
    "images_per_s": 512.4,
    "data_wait_share": 3.2,
    "attack_share": 37.0,
    "learning_rate": 0.0123456,
}


def test_a_training_line() -> None:
    stream = io.StringIO()
    ConsoleTracker(stream, total_steps=1560, global_size=256).log(METRICS, images_seen=120 * 256)
    assert stream.getvalue() == (
        "step  120/1560  epoch  2.31  loss 5.123 (clean 5.000, attacked 5.200)     512 images/s  left 11:59\n"
    )


def test_a_line_has_the_share_of_the_peak_rate_where_it_is_known() -> None:
    stream = io.StringIO()
    ConsoleTracker(stream, total_steps=1560, global_size=256).log({**METRICS, "mfu": 41.4}, images_seen=120 * 256)
    assert "  512 images/s  MFU 41 %  left 11:59" in stream.getvalue()
    line = read_line(stream.getvalue().strip())
    assert line is not None
    assert (line.speed, line.left) == ("512 images/s", "left 11:59")


def test_a_line_has_at_most_100_characters_unless_data_is_waited_for() -> None:
    """They had 124."""
    stream = io.StringIO()
    console = ConsoleTracker(stream, total_steps=250_000, global_size=4096)
    console.log({**METRICS, "step": 100_000, "epoch": 49.97, "images_per_s": 14_123.0}, 100_000 * 4096)
    console.log({**METRICS, "data_wait_share": 12.3}, 120 * 4096)
    short, waiting = stream.getvalue().splitlines()
    assert len(short) <= 105
    assert "data wait 12 %" in waiting


def test_what_is_written_is_read_back() -> None:
    """A terminal's bar moves by the lines."""
    stream = io.StringIO()
    console = ConsoleTracker(stream, total_steps=1560, global_size=256)
    console.log({**METRICS, "data_wait_share": 50.0, "bad_samples": 3.0}, 120 * 256)
    console.log({"step": 120.0, "loss": 2.0}, 120 * 256)
    console.log({"step": 120.0, "epoch": 1.0, "knn_accuracy": 43.219}, 120 * 256)
    full, short, knn = (read_line(line) for line in stream.getvalue().splitlines())
    assert full == StepLine(120, 1560, "loss 5.123 (clean 5.000, attacked 5.200)", "512 images/s", "left 11:59", "")
    assert short == StepLine(120, 1560, "loss 2.000", "", "", "")
    assert knn == StepLine(120, 1560, "", "", "", "kNN accuracy 43.22 %")
    assert [read_line(line) for line in ("", "step 3", "finished: 4 steps", "length: 60 steps")] == [None] * 4


def test_lines_of_one_run_align() -> None:
    stream = io.StringIO()
    console = ConsoleTracker(stream, total_steps=1560, global_size=256)
    for step, speed, rate in ((1, 9.0, 1e-4), (1559, 51234.0, 0.3)):
        console.log({**METRICS, "step": step, "images_per_s": speed, "learning_rate": rate}, step * 256)
    columns = [[line.index(word) for word in ("epoch", "loss", "images/s", "left")] for line in stream.getvalue().splitlines()]
    assert columns[0] == columns[1]


def test_knn_has_a_line_of_its_own_and_diagnostics_have_none() -> None:
    stream = io.StringIO()
    console = ConsoleTracker(stream, total_steps=10, global_size=4)
    console.log({"step": 5, "epoch": 1.0, "knn_accuracy": 43.219}, 20)
    console.log({"step": 5, "epoch": 1.0, "delta_linf": 0.01}, 20)
    assert stream.getvalue() == "step  5/10  epoch  1.00  kNN accuracy 43.22 %\n"
    console.log({"step": 5, "epoch": 1.0, "knn_accuracy": 43.219, "knn_accuracy_low": 40.1, "knn_accuracy_high": 46.4}, 20)
    assert stream.getvalue().endswith("kNN accuracy 43.22 % (95 % interval 40.1 – 46.4)\n")


def test_plain_simclr_has_no_adversarial_column() -> None:
    stream = io.StringIO()
    ConsoleTracker(stream, total_steps=10, global_size=4).log({"step": 1, "loss": 2.0}, 4)
    assert stream.getvalue() == "step  1/10  loss 2.000\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (7387, "2:03:07"), (86_399, "23:59:59"), (86_400, "1 d 00:00:00"), (352987, "4 d 02:03:07")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
