"""A run on a terminal: its lines above one bar. In a log, and for a reader that is none, plain lines."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from clae_dist.config import Config
from clae_dist.launchers.rank import Console
from clae_dist.launchers.terminal import QUIET, Terminal, shown_on
from clae_dist.tracking.console import ConsoleTracker

METRICS = {"epoch": 1.0, "loss": 5.0, "loss_clean": 2.0, "loss_adversarial": 3.0, "images_per_s": 512.0}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def said(write_to: object) -> None:
    """What a run says, to a text stream."""
    console = write_to
    for line in ("starting: opening the shards", "model: small_resnet", "starting: the first step", "path/[red]x: 1"):
        print(line, file=console, flush=True)  # type: ignore[call-overload]
    tracker = ConsoleTracker(console, total_steps=4, global_size=8)  # type: ignore[arg-type]
    for step in (1, 2, 3, 4):
        tracker.log({**METRICS, "step": step}, step * 8)
    tracker.log({"step": 4, "knn_accuracy": 50.0}, 32)
    print("finished: 4 steps", file=console)  # type: ignore[call-overload]


def test_the_lines_of_a_terminal_stand_above_its_bar() -> None:
    stream = io.StringIO()
    terminal = Terminal(RichConsole(file=stream, force_terminal=True, width=100, markup=False, highlight=False))
    said(terminal)
    terminal.close()
    raw = stream.getvalue()
    assert "\x1b[?25l" not in raw  # a rank that is killed would leave the cursor hidden
    shown = ESCAPES.sub("", raw)
    lines = [line.rsplit("\r", 1)[-1] for line in shown.split("\n")]
    assert lines[-2] == "finished: 4 steps"
    assert [line for line in lines if line.startswith(("model", "path", "step 4", "finished"))] == [
        "model: small_resnet",
        "path/[red]x: 1",  # no markup
        "step 4: kNN accuracy 50.00 %",
        "finished: 4 steps",
    ]
    assert "opening the shards" in shown
    assert not [line for line in lines if line.startswith("step ") and "loss" in line]
    bar = next(line for line in reversed(lines) if "training" in line)
    assert re.search(r"training .* 4/4 loss 5\.000 \(clean 2\.000, attacked 3\.000\) 512 images/s \d:\d\d:\d\d left 0:00", bar)


def test_console_log_keeps_plain_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    terminal = Terminal(RichConsole(file=stream, force_terminal=True, width=100))
    console = Console(Config(run_dir=str(tmp_path)), terminal)  # type: ignore[arg-type]
    said(console)
    console.end()
    kept = (tmp_path / "console.log").read_text()
    assert "\x1b" not in kept
    assert "\r" not in kept
    assert "step 4/4  epoch  1.00  loss 5.000 (clean 2.000, attacked 3.000)" in kept
    assert "starting: opening the shards\n" in kept


def test_who_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(QUIET, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    log = io.StringIO()
    assert shown_on(log) is log
    parent, child = pty.openpty()
    with os.fdopen(parent), os.fdopen(child, "w") as terminal:
        assert isinstance(shown_on(terminal), Terminal)
        monkeypatch.setenv("TERM", "dumb")
        assert shown_on(terminal) is terminal
        monkeypatch.setenv(QUIET, "1")
        assert shown_on(terminal) is None
    assert shown_on(sys.stdout) is None
