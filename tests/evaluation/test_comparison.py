"""`clae compare`: runs side by side under their names, with the settings in which they differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from clae_dist.cli import main
from clae_dist.config import Batch, Config
from clae_dist.report.comparison import differences

MakeRun = Callable[..., Path]


@pytest.fixture
def runs(make_run: MakeRun, tmp_path: Path) -> list[Path]:
    return [
        make_run(f"name={name}", f"objective.temperature={temperature}", checkpoint=False, run_dir=tmp_path / name)
        for name, temperature in (("one", 0.1), ("two", 0.5))
    ]


def test_heads_results_and_differences(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["one", "two"]
    assert "settings that differ" in lines
    below = [line.split() for line in lines[lines.index("settings that differ") :]]
    assert ["objective.temperature", "0.1", "0.5"] in below
    assert not any(line[:1] == ["name"] for line in below)  # of every run


def test_equal_settings_have_no_section(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(f"name={name}", checkpoint=False, run_dir=tmp_path / name) for name in ("one", "two")]
    assert main(["compare", *map(str, runs)]) == 0
    assert "settings that differ" not in capsys.readouterr().out


def test_runs_of_different_sets_are_refused(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    identity = json.loads((runs[1] / "run.json").read_text())
    (runs[1] / "run.json").write_text(json.dumps({**identity, "manifest_digest": "f" * 64}))
    assert main(["compare", *map(str, runs)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ffffffffffff" in line
    assert "name runs of one set" in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["one"], "name two or more"), (["one", "one"], "in the table already"), (["one", "no"], "config.yaml")],
)
def test_what_cannot_be_compared(runs: list[Path], capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    assert main(["compare", *(str(runs[0].parent / word) for word in words)]) == 2
    assert expected in capsys.readouterr().err


def test_a_setting_that_only_one_method_has() -> None:
    from clae_dist.methods.simclr import SimClr

    differ = differences([Config(), Config(method=SimClr.Settings(), batch=Batch(global_size=128))])
    assert differ["method.alpha"] == [1.0, None]
    assert differ["batch.global_size"] == [256, 128]
    assert "run_dir" not in differ
