"""Every check has a verdict: one that fails, crashes, hangs or is interrupted is recorded, and the exit code says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clae_dist.errors import BAD_CONFIG, HUNG, INTERRUPTED, OK, UNEXPECTED, ConfigError
from clae_dist.verify import run
from clae_dist.verify.check import Check
from clae_dist.verify.plan import checks
from clae_dist.verify.run import Request, verify
from tests import processes
from tests.processes import TORCHRUN
from tests.verify import planted
from tests.verify.planted import on_host, on_ranks, subject


def run_checks(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *plan: Check, limit_s: float = 60.0
) -> tuple[int, str, dict[str, Any], list[str]]:
    """Exit code, table, JSON and lines of progress of a verification with these checks."""
    monkeypatch.setattr(run, "checks", lambda subject, only: list(plan))
    lines: list[str] = []
    ending = verify(Request(subject(folder, limit_s), "local"), lines.append)
    return ending.code, ending.message, json.loads((folder / "verify.json").read_text()), lines


def test_all_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = on_ranks(planted.passes), on_ranks(planted.does_not_apply)
    code, table, content, lines = run_checks(monkeypatch, tmp_path, *plan)
    assert code == OK
    assert content["passed"]
    assert content["ended"] == "finished"
    assert [entry["verdict"] for entry in content["checks"]] == ["pass", "skipped"]
    assert content["checks"][0]["figures"] == {"sum": 1.0}
    assert content["configuration"]["model.encoder"] == "small_resnet"
    assert {"torch", "python", "clae-dist"} <= set(content["versions"])
    assert "2 checks: 1 passed, 0 failed, 1 skipped" in table
    assert (tmp_path / "verify.txt").read_text() == f"{table}\n"
    assert lines[0] == "[1/2] passes: planted"


def test_a_check_that_fails_crashes_or_hangs_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    faults = planted.differs, planted.raises_alone, planted.is_killed, planted.hangs
    code, table, content, _ = run_checks(monkeypatch, tmp_path, *map(on_ranks, faults), on_ranks(planted.passes), limit_s=5.0)
    assert code == UNEXPECTED
    assert not content["passed"]
    reasons = {entry["check"]: entry["reason"] for entry in content["checks"] if entry["verdict"] == "fail"}
    assert set(reasons) == {fault.__name__ for fault in faults}
    assert reasons["differs"] == "rank 1: planted on 1"
    assert "rank 1: ValueError: planted" in reasons["raises_alone"]
    assert "rank 1 of 2 was killed by SIGKILL" in reasons["is_killed"]
    assert "had no result after 5 s" in reasons["hangs"]
    assert "Traceback" in content["checks"][1]["error"]
    assert "in hangs" in content["checks"][3]["error"]  # the stacks of both ranks
    assert content["checks"][-1]["verdict"] == "pass"
    assert "5 checks: 1 passed, 4 failed, 0 skipped" in table


def test_ctrl_c_leaves_the_table_so_far(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = on_ranks(planted.passes), on_host(planted.interrupted), on_ranks(planted.passes, "later")
    code, table, content, _ = run_checks(monkeypatch, tmp_path, *plan)
    assert code == INTERRUPTED
    assert content["ended"] == "interrupted"
    assert not content["passed"]
    assert content["not_run"] == ["interrupted", "later"]
    assert "later        not run" in table


def test_only(tmp_path: Path) -> None:
    named = [check.name for check in checks(subject(tmp_path), ("parity", "bench *"))]
    assert named == [
        "parity ddp",
        "parity fsdp2",
        "parity zero-1",
        "parity zero-3",
        "bench gpu-counts",
        "bench step",
        "bench data",
    ]
    with pytest.raises(ConfigError, match="--only names 'party'; expected one of doctor, "):
        checks(subject(tmp_path), ("party",))


def test_arguments_that_cannot_be_used() -> None:
    done = processes.clae("verify", "--workers", "-1")
    assert done.returncode == BAD_CONFIG
    assert "--workers is -1; use 1 or more" in done.stderr


@pytest.mark.slow
def test_the_quick_form_passes_on_two_cpu_ranks(tmp_path: Path) -> None:
    done = processes.clae("verify", "--quick", "--device", "cpu", "--to", tmp_path / "to", timeout=900)
    content = json.loads((tmp_path / "to" / "verify.json").read_text())
    assert done.returncode == OK, done.stdout + done.stderr
    assert content["passed"]
    verdicts = {entry["check"]: entry["verdict"] for entry in content["checks"]}
    assert {name for name, verdict in verdicts.items() if verdict != "pass"} <= {"compile"}
    assert len(verdicts) > 9
    assert not (tmp_path / "to" / "work").exists()


@pytest.mark.slow
def test_the_ranks_of_torchrun_share_all_checks(tmp_path: Path) -> None:
    names = "collectives,batch norm,resume"
    done = processes.run(
        *TORCHRUN, "verify", "--quick", "--device", "cpu", "--only", names, "--to", tmp_path / "to", timeout=600
    )
    assert done.returncode == OK, done.stdout + done.stderr
    content = json.loads((tmp_path / "to" / "verify.json").read_text())
    assert (content["launcher"], content["ranks"], content["passed"]) == ("torchrun", 2, True)
    assert done.stdout.count("3 checks: 3 passed") == 1


_HANGING = """
import sys
from pathlib import Path
from clae_dist.verify import run
from tests.verify import planted
checks = [planted.on_ranks(planted.passes), planted.on_ranks(planted.hangs)]
run.checks = lambda subject, only: checks
run.verify(run.Request(planted.subject(Path(sys.argv[1]), limit_s=4.0), "local"), print)
"""


@pytest.mark.slow
def test_a_hang_on_the_ranks_of_torchrun_ends_the_command_with_a_record(tmp_path: Path) -> None:
    program = tmp_path / "hanging.py"
    program.write_text(_HANGING)
    torchrun = TORCHRUN[:5]
    done = processes.run(*torchrun, program, tmp_path / "to")
    assert done.returncode != OK
    content = json.loads((tmp_path / "to" / "verify.json").read_text())
    assert content["ended"] == "hung"
    assert [entry["verdict"] for entry in content["checks"]] == ["pass", "fail"]
    assert "rank 0, 1 had no result after 4 s" in content["checks"][1]["reason"]
    assert f"exitcode : {HUNG}" in " ".join(done.stderr.split()) or str(HUNG) in done.stderr
