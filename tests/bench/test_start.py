"""`clae bench start`: whole runs are measured, and a failed one is reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from clae_dist.bench import start

pytest.importorskip("lightly", reason="of the extra `bench`")
_TINY = start.StartBench(image_size=16, batch=8, workers=0, steps=2, repeats=1)


@pytest.mark.slow
def test_both_contenders_are_measured() -> None:
    lines: list[str] = []
    outcome = start.bench(_TINY, lines.append)
    assert [row.name for row in outcome.rows] == ["clae", "lightly"]
    assert all(row.median_s > 0 and (row.added_bytes or 0) > 100e6 for row in outcome.rows)
    assert outcome.rows[0].bytes_ratio_to.keys() == outcome.rows[0].ratio_to.keys() == {"lightly"}
    assert len(lines) == 2


def test_a_run_that_fails_is_reported_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_RECIPE", "nonsense: 1\n")
    monkeypatch.setattr(start, "reversed", lambda contenders: contenders, raising=False)  # ours first
    with pytest.raises(start.ContenderFailedError, match=r"clae did not finish its run:\n(.|\n)*nonsense"):
        start.bench(_TINY, lambda text: None)


def test_memory_of_children_is_counted() -> None:
    allocate = "import time; data = bytearray(50_000_000); print(flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {allocate!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, process_group=0) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            assert start._tree_bytes(process.pid) > 50_000_000
        finally:
            os.killpg(process.pid, signal.SIGKILL)
