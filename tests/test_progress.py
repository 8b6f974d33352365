"""Progress of long work, on a terminal, in a log and through a printer."""

from __future__ import annotations

import io

import pytest

from clae_dist.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds = [0.0]
    monkeypatch.setattr("clae_dist.progress.time.monotonic", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize(("stream", "num_texts", "num_lines"), [(Terminal(), 41, 1), (io.StringIO(), 3, 3)])
def test_one_line_on_a_terminal_and_a_line_every_five_seconds_elsewhere(
    now: list[float], stream: io.StringIO, num_texts: int, num_lines: int
) -> None:
    progress = Progress(1000, done=200, stream=stream)
    for _ in range(40):
        now[0] += 0.25
        progress.add(10)
    progress.close()
    text = stream.getvalue()
    assert (text.count("images/s"), text.count("\n")) == (num_texts, num_lines)
    assert "600 of 1,000 images, 40 images/s, 0:10 left" in text


def test_lines_through_a_printer_also_while_nothing_is_finished(now: list[float]) -> None:
    said: list[str] = []
    progress = Progress(30, name="shards", label="indexing, ", say=said.append)
    now[0] = 8.0
    progress.add(0)
    now[0] = 20.0
    progress.add(30)
    assert said == ["indexing, 0 of 30 shards, 0:08 so far", "indexing, 30 of 30 shards, 1.5 shards/s, in 20.0 s"]


def test_work_that_was_too_short_for_a_line_can_have_none(now: list[float]) -> None:
    stream = io.StringIO()
    Progress(10, stream=stream).close(only_if_printed=True)
    assert stream.getvalue() == ""


def test_durations() -> None:
    assert [duration(s) for s in (0, 187, 7387, 353_000)] == ["0:00", "3:07", "2:03:07", "4 d 02:03:20"]


def test_the_last_line_comes_once(now: list[float]) -> None:
    said: list[str] = []
    progress = Progress(100, say=said.append)
    now[0] += 6
    progress.add(100)
    progress.close()
    assert said == ["100 of 100 images, 17 images/s, in 6.0 s"]
