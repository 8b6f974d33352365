"""`clae runs`: state, progress and last metrics of many run folders, damaged ones included."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from clae_dist.cli import main
from clae_dist.config import Config, Optim, Train
from clae_dist.errors import ConfigError
from clae_dist.lease import hold
from clae_dist.recipe import to_yaml
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.listing import ListedRun, list_runs, table_of

IDENTITY = {"package_version": "1", "git_revision": "", "manifest_digest": "d", "world_size": 1, "backend": "ddp"}
CONFIG = to_yaml(Config(name="one # two", train=Train(epochs=2.5), optim=Optim(warmup_epochs=0.0)))


def write_run(path: Path, steps: int = 10, of: int = 10, config: str = CONFIG) -> RunFolder:
    """A run of `steps` steps of `of`, 4 steps an epoch."""
    path.mkdir(parents=True)
    folder = RunFolder(path)
    folder.config_file.write_text(config)
    folder.identity_file.write_text(json.dumps({**IDENTITY, "collectives": "gloo", "run_key": "a", "started": 1.0}))
    lines = [{"step": s, "epoch": s / of * 2.5, "images_seen": s, "loss": 5.0 - s / 10} for s in range(1, steps + 1)]
    folder.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def only(folder: Path) -> ListedRun:
    (run,) = list_runs(folder)
    return run


def test_states(tmp_path: Path) -> None:
    write_run(tmp_path / "finished")
    write_run(tmp_path / "deep" / "er" / "stopped", steps=4)
    held, dead, elsewhere = (write_run(tmp_path / name, steps=4) for name in ("held", "dead", "elsewhere"))
    lease = {
        "id": "x",
        "what": "clae train",
        "host": "h",
        "machine": "another",
        "pid": 1,
        "started": 1,
        "since": 1.0,
        "beats": 1,
    }
    for folder in (dead, elsewhere):
        folder.training_lease.write_text(json.dumps(lease))
    long_ago = time.time() - 100
    os.utime(dead.training_lease, (long_ago, long_ago))
    os.utime(dead.metrics_file, (long_ago, long_ago))
    with hold(held.training_lease, "clae train", ConfigError, "wait."):
        runs = {Path(run.folder).name: run for run in list_runs(tmp_path)}
    assert {name: run.state for name, run in runs.items()} == {
        "finished": "finished",
        "stopped": "stopped",
        "held": "running",
        "dead": "dead",
        "elsewhere": "running",  # its lease has changed within EXPIRY_S
    }
    assert (runs["finished"].progress, runs["stopped"].progress, runs["stopped"].step) == (1.0, 0.4, 4)
    assert runs["stopped"].metrics == {"loss": 4.6}
    assert runs["dead"].since == pytest.approx(long_ago, abs=0.01)
    assert runs["held"].name == "one # two"
    assert "clae train on host" in runs["held"].held_by


def test_a_lease_whose_process_is_gone(tmp_path: Path) -> None:
    """kill -9 leaves the lease: the run is dead, not running."""
    folder = write_run(tmp_path / "run", steps=4)
    pid = os.fork()
    if pid == 0:
        with hold(folder.training_lease, "clae train", ConfigError, "wait."):
            os._exit(0)
    os.waitpid(pid, 0)
    assert only(tmp_path).state == "dead"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.yaml", b"\xff\xfe", "UTF-8"),
        ("config.yaml", b"name: x\n", "no train.epochs"),
        ("config.yaml", b"train:\n  epochs: .nan\n", "no train.epochs"),
        ("run.json", b"{", "no valid JSON"),
        ("metrics.jsonl", b"\x00" * 100 + b"\n", "hold no metrics"),
    ],
)
def test_a_damaged_run_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes, words: str
) -> None:
    write_run(tmp_path / "good")
    (write_run(tmp_path / "bad").path / file).write_bytes(content)
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert words in lines[1]
    assert "finished" in lines[2]
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert [run["state"] for run in json.loads(capsys.readouterr().out)] == ["damaged", "finished"]


def test_odd_entries(tmp_path: Path) -> None:
    """A fifo in the place of a file, a link to the folder above, a file that is being written, names with controls."""
    write_run(tmp_path / "a\x1b[2J")
    (tmp_path / "a\x1b[2J" / "loop").symlink_to(tmp_path)
    fifo = write_run(tmp_path / "fifo")
    fifo.metrics_file.unlink()
    os.mkfifo(fifo.metrics_file)
    cut = write_run(tmp_path / "z-cut")
    cut.metrics_file.write_text(cut.metrics_file.read_text() + '{"step": 11, "lo')
    runs = list_runs(tmp_path)
    assert [run.state for run in runs] == ["finished", "damaged", "finished"]
    assert "\x1b" not in "".join(table_of(runs, tmp_path, time.time()))


def test_a_thousand_runs_in_a_second(tmp_path: Path) -> None:
    """The time is that of this process, as others share the machine; long metrics are read from their end."""
    long = write_run(tmp_path / "0000").metrics_file
    line = json.dumps({"step": 1, "epoch": 0.25, "images_seen": 1, "loss": 1.0}) + "\n"
    long.write_text(line * 200_000 + long.read_text())
    for number in range(1, 1000):
        write_run(tmp_path / f"{number:04}")
    started = time.process_time()
    runs = list_runs(tmp_path)
    seconds = time.process_time() - started
    assert len(runs) == 1000
    assert {run.state for run in runs} == {"finished"}
    assert seconds < 1.0


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "no run folders" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
