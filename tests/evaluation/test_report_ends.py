from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from clae_dist.errors import Cause
from clae_dist.report.record import read_record, summarise
from clae_dist.report.run_page import write_report
from clae_dist.runs.ends import Attempt
from tests.evaluation.test_report import MakeRun, Page, _quiet


def test_how_starts_ended_is_in_the_report_and_the_summary(make_run: MakeRun, write_metrics: Callable[[Path], None]) -> None:
    run = make_run()
    write_metrics(run)
    assert summarise(read_record(run))["last_end"] is None
    assert "last end" not in Page(write_report(run, _quiet)).text
    causes: list[tuple[Cause, str]] = [("memory", "CUDA out of memory"), ("memory", "again"), ("code", "<b> \x1b[2J at a line")]
    for number, (cause, text) in enumerate(causes):
        Attempt(float(number + 1), 17).end(run, 1, 2, cause, 1, text, host="node-3")
    Attempt(3.0, 17).end(run, 0, 2, "network", 8, "Connection closed by peer", host="node-0")  # of the same start
    ends = run / "ends.jsonl"
    ends.write_text(ends.read_text() + "cut off")
    text = Page(write_report(run, _quiet)).text
    assert "last end" in text
    assert "code (rank 1 on node-3, after step 17): <b> \\x1b[2J at a line; of 3 starts: memory 2, code 1" in text
    assert json.loads((run / "summary.json").read_text())["last_end"].startswith("code (rank 1 on node-3, after step 17): <b> ")
