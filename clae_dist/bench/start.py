"""`clae bench start`: time to the first update and peak memory of a run on one rank, compared with a loop written with lightly.

Both are started as a user would, in turns, on the CPU, with the same encoder, images, batch and loader processes.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from clae_dist.bench import start_peer
from clae_dist.bench.measure import Say, Times, make_rows
from clae_dist.bench.outcome import Outcome
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.runs.folder import RunFolder

_TIMEOUT_S = 600.0
_SAMPLE_S = 0.02
_RECIPE = """\
model: {encoder: torchvision/resnet18, stem: imagenet}
method: {name: simclr}
optim: {name: adamw, learning_rate: 1e-3, scaling: none, warmup_epochs: 0}
train: {log_every: 1, knn_every: 0, precision: float32}
launch: {launcher: local, workers: 1, device: cpu}
tracking: {name: none}
"""


@dataclass(frozen=True)
class StartBench:
    image_size: int = 32
    batch: int = 32
    workers: int = 1  # loader processes
    steps: int = 4
    repeats: int = 5


FULL = StartBench()
QUICK = StartBench(repeats=1)


class ContenderFailedError(RuntimeError):
    """A contender did not finish its run."""


@dataclass(frozen=True)
class _Contender:
    name: str
    note: str
    command: list[str]
    steps_file: Path  # has a line after the first update


@dataclass(frozen=True)
class _Start:
    first_update_s: float
    peak_bytes: int


def bench(settings: StartBench, say: Say) -> Outcome:
    """Return a row for each contender: time to the first update; proportional set size of the process tree at its peak.

    Raises ContenderFailedError.
    """
    starts: dict[str, list[_Start]] = {}
    notes = {}
    with tempfile.TemporaryDirectory(prefix="clae-start-") as name:
        _write_images(Path(name), settings)
        for repeat in range(settings.repeats):
            contenders = _contenders(Path(name), settings, repeat)
            for contender in contenders if repeat % 2 else reversed(contenders):
                start = _measure(contender, Path(name) / "output.log")
                notes[contender.name] = contender.note
                starts.setdefault(contender.name, []).append(start)
                say(f"{contender.name}: {start.first_update_s:.1f} s, {start.peak_bytes / 1e6:.0f} MB")
    case = f"resnet18, {settings.batch} images of {settings.image_size} pixels, loader processes: {settings.workers}"
    times = {name: Times([start.first_update_s for start in each]) for name, each in starts.items()}
    peaks = {name: round(statistics.median(start.peak_bytes for start in each)) for name, each in starts.items()}
    rows = make_rows(case, dict(sorted(notes.items())), times, {name: {"added_bytes": peak} for name, peak in peaks.items()})
    return Outcome(rows, torch.device("cpu"))


def _write_images(folder: Path, settings: StartBench) -> None:
    write_synthetic_set(folder / "shards", settings.batch * settings.steps, settings.image_size, num_shards=4)
    pictures = folder / "images" / "one"  # a class
    pictures.mkdir(parents=True)
    for shard in (folder / "shards").glob("train-*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".jpg") and (file := tar.extractfile(member)) is not None:
                    (pictures / Path(member.name).name).write_bytes(file.read())
    (folder / "recipe.yaml").write_text(_RECIPE)


def _contenders(folder: Path, settings: StartBench, repeat: int) -> list[_Contender]:
    run = folder / f"run-{repeat}"
    sizes = [settings.image_size, settings.batch, settings.workers, settings.steps]
    plain_steps = folder / f"plain-{repeat}"
    train = ["-m", "clae_dist", "train", str(folder / "recipe.yaml"), f"data.shards={folder / 'shards'}", f"run_dir={run}"]
    train += [f"data.image_size={settings.image_size}", f"data.workers={settings.workers}", "train.epochs=1"]
    plain = [start_peer.__file__, str(folder / "images"), str(plain_steps), *map(str, sizes)]
    return [
        _Contender("clae", "clae train", [*train, f"batch.global_size={settings.batch}"], RunFolder(run).metrics_file),
        _Contender("lightly", "the loop written with lightly", plain, plain_steps),
    ]


def _measure(contender: _Contender, log: Path) -> _Start:
    """Run a contender to its end. Raises ContenderFailedError."""
    begin = time.monotonic()
    first, peak = math.nan, 0
    with python_process(contender.command, log) as process:
        while process.poll() is None and time.monotonic() - begin < _TIMEOUT_S:
            if math.isnan(first) and contender.steps_file.exists() and contender.steps_file.stat().st_size:
                first = time.monotonic() - begin
            peak = max(peak, _tree_bytes(process.pid))
            time.sleep(_SAMPLE_S)
        if process.poll() != 0 or math.isnan(first):
            raise ContenderFailedError(f"{contender.name} did not finish its run:\n{log.read_text()[-2000:]}")
    return _Start(first, peak)


@contextmanager
def python_process(arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`python ARGUMENTS` with its output in `log`; killed at the end, and if this process dies."""
    lifetime = ["-m", "clae_dist.lifetime", str(os.getpid())]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *lifetime, sys.executable, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2],  # where Python finds this package, installed or not
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _tree_bytes(root: int) -> int:
    """Proportional set size of a process and its descendants: shared memory counts once."""
    total = 0
    with suppress(psutil.Error):
        for process in (psutil.Process(root), *psutil.Process(root).children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total
