"""`clae bench checkpoint`: how long a save blocks training, compared with torch's and with a copy of the same bytes."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clae_dist.bench.bucket import serve_bucket
from clae_dist.bench.measure import Row, Runs, Say, Times, UnequalError, make_rows, time_in_turns
from clae_dist.bench.outcome import Outcome, amount
from clae_dist.config import Config, Data, Model, Optim, Train
from clae_dist.devices import local_device
from clae_dist.methods.simclr import SimClr
from clae_dist.models import build_model
from clae_dist.parallel import Backend, make_backend
from clae_dist.runs.checkpoint import Writer, load_checkpoint
from clae_dist.runs.folder import RunFolder
from clae_dist.staging import staging_folder
from clae_dist.world import World

BARS = {"copy": 1.5, "torch_save": 0.1}  # largest ratio of our time to that of each
BUCKET_BAR = 1.2  # of a save to a bucket, to that of a local folder
DELAY_S, BYTES_PER_S = 0.02, 100e6  # of the link to the bucket
_WORK = 40  # products of matrices beside a save
_TURNS = 3  # times as many repeats for a folder and a bucket, which differ little


@dataclass(frozen=True)
class CheckpointBench:
    """Weights and AdamW's two moments of an encoder: 1.06 GB for ViT-B/16."""

    encoder: str = "timm/vit_base_patch16_224"
    image_size: int = 224
    repeats: int = 5
    bucket: bool = False  # a row about a run folder on object storage, too


FULL = CheckpointBench()
QUICK = CheckpointBench("timm/vit_small_patch16_224", 224, 3)  # 0.27 GB


def bench(settings: CheckpointBench, say: Say) -> Outcome:
    """Rows of one case. Raises UnequalError unless the loaded state is, bit for bit, the saved one."""
    device = local_device()
    with ExitStack() as stack:
        url = stack.enter_context(serve_bucket(DELAY_S, BYTES_PER_S)) if settings.bucket else ""
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="clae-checkpoint-"))
        say(f"making the state of {settings.encoder}, writing to {folder}{' and to a bucket' if url else ''}")
        contest = _Contest(_trained(settings, device), device, Path(folder), url)
        contest.check()
        say("the loaded state is equal; timing")
        return contest.outcome(settings)


def _trained(settings: CheckpointBench, device: torch.device) -> Backend:
    """A backend after one step of the optimiser with random gradients."""
    config = Config(
        model=Model(encoder=settings.encoder),
        method=SimClr.Settings(),
        optim=Optim(name="adamw"),
        train=Train(precision="float32"),
        data=Data(image_size=settings.image_size),
    )
    backend = make_backend(config, build_model(config), World.single(device))
    for parameter in backend.parameters():
        parameter.grad = torch.randn_like(parameter)
    backend.update()
    return backend


class _Contest:
    """The ways to save one state."""

    def __init__(self, backend: Backend, device: torch.device, folder: Path, url: str) -> None:
        self._backend, self._device, self._folder = backend, device, folder
        self._writer = Writer(folder, 0, 1, "bench", device)
        self._staging = staging_folder(f"{url}/run") if url else None
        self._to_bucket = Writer(self._staging, 0, 1, "bench", device) if self._staging else None
        self._writers = [writer for writer in (self._writer, self._to_bucket) if writer is not None]
        self._steps = itertools.count(1)
        self._future: Any = None
        self._num_bytes = sum(piece.tensor.nbytes for piece in backend.pieces())
        self._source = torch.ones(self._num_bytes, dtype=torch.uint8, device=device)
        self._target = torch.zeros(self._num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def _plain(self) -> dict[str, Any]:
        return {piece.name: piece.tensor for piece in self._backend.pieces()}

    # ---- timed calls ----

    def ours(self) -> None:
        self._step = next(self._steps)
        self._writer.begin(self._step, self._backend.pieces())

    def bucket(self) -> None:
        assert self._to_bucket is not None
        self._step = next(self._steps)
        self._to_bucket.begin(self._step, self._backend.pieces())

    def copy(self) -> None:
        self._target.copy_(self._source)

    def torch_save(self, *, sync: bool = False) -> None:
        with (self._folder / "state.pt").open("wb") as file:
            torch.save(self._plain(), file)
            if sync:
                file.flush()
                os.fsync(file.fileno())

    def async_save(self) -> None:
        from torch.distributed import checkpoint

        shutil.rmtree(self._folder / "dcp", ignore_errors=True)
        self._future = checkpoint.async_save(self._plain(), checkpoint_id=self._folder / "dcp", no_dist=True)

    def ready(self) -> None:
        """Wait for background work and remove uncommitted checkpoints."""
        for writer in self._writers:
            writer.join()
            assert not writer.problem, writer.problem
        if self._future is not None:
            self._future.result()
            self._future = None
        for folder in filter(None, (self._folder, self._staging)):
            for unfinished in RunFolder(folder).checkpoints.glob("*.partial-*"):
                shutil.rmtree(unfinished)
        os.sync()

    # ---- comparison and times ----

    def check(self) -> None:
        self.committed_s()
        saved = load_checkpoint(self._folder, lambda text: None)
        self.torch_save()
        theirs = torch.load(self._folder / "state.pt", map_location="cpu", weights_only=True)
        for name, value in self._plain().items():
            if saved is None or not torch.equal(saved[name], value.cpu()) or not torch.equal(theirs[name], value.cpu()):
                raise UnequalError(f"{name} is not what was saved, so the times cannot be compared.")

    def committed_s(self, save: Callable[[], None] | None = None, writer: Writer | None = None) -> float:
        """Seconds from the start of a save until the checkpoint is committed."""
        writer = writer or self._writer
        self.ready()
        start = time.perf_counter()
        (save or self.ours)()
        writer.join()
        writer.commit(self._step, "ddp", {"images_seen": 0}, 1, 0.0)
        writer.join()
        assert not writer.problem, writer.problem
        return time.perf_counter() - start

    def beside(self, repeats: int) -> tuple[dict[str, Times], dict[str, Times]]:
        """The time that a save blocks, to the folder and to the bucket in turns, and the same with the work after it.

        The rest of a save takes cores from that work.
        """
        factor = torch.ones(1024, 1024, device=self._device)
        blocked: dict[str, Times] = {}

        def work(name: str, save: Callable[[], None]) -> None:
            start = time.perf_counter()
            save()
            blocked.setdefault(name, Times([])).wall.append(time.perf_counter() - start)
            for _ in range(_WORK):
                factor @ factor

        runs = {name: partial(work, name, save) for name, save in (("folder", self.ours), ("bucket", self.bucket))}
        with_work = time_in_turns(runs, self._device, repeats, ready=self.ready, at_least_s=0.0)
        return {name: Times(times.wall[-repeats:]) for name, times in blocked.items()}, with_work

    def outcome(self, settings: CheckpointBench) -> Outcome:
        committed_s = statistics.median(self.committed_s() for _ in range(max(1, settings.repeats // 2)))
        saved = load_checkpoint(self._folder, lambda text: None)
        assert saved is not None
        runs: Runs = {
            "ours": ("the time that a save blocks; the rest runs in the background", self.ours),
            "copy": ("of the same bytes into memory that is already allocated", self.copy),
            "torch_save": ("complete, without fsync", self.torch_save),
            "torch_save_fsync": ("complete, until it is on the disk", lambda: self.torch_save(sync=True)),
            "async_save": ("torch.distributed.checkpoint's, in one process: the time that it blocks", self.async_save),
        }
        calls = {name: run for name, (_, run) in runs.items()}
        times = time_in_turns(calls, self._device, settings.repeats, ready=self.ready, at_least_s=0.0)
        self.ready()
        figures: dict[str, dict[str, Any]] = {name: {"floor_s": times["copy"].median_s} for name in runs}
        figures["ours"]["more"] = {"committed_s": committed_s, "written_bytes": float(saved.index.num_bytes)}
        case = f"{settings.encoder}, weights and AdamW's state: {amount(self._num_bytes)}"
        rows = make_rows(case, {name: note for name, (note, _) in runs.items()}, times, figures)
        more, notes = self._bucket_rows(settings, case) if self._to_bucket else ([], [])
        return Outcome([*rows, *more], self._device, [_verdict(times), *notes])

    def _bucket_rows(self, settings: CheckpointBench, case: str) -> tuple[list[Row], list[str]]:
        committed_s = {"folder": self.committed_s(), "bucket": self.committed_s(self.bucket, self._to_bucket)}
        blocked, with_work = self.beside(_TURNS * settings.repeats)
        link = f"{1000 * DELAY_S:g} ms, {BYTES_PER_S / 1e6:g} MB/s"
        notes = {"folder": "a local run folder", "bucket": f"a run folder on object storage: loopback, {link}"}
        figures = {
            name: {"more": {"with_work_s": with_work[name].median_s, "committed_s": committed_s[name]}} for name in notes
        }
        return make_rows(f"{case}, in turns", notes, blocked, figures), [_bucket_verdict(blocked, with_work)]


def _verdict(times: dict[str, Times]) -> str:
    parts = []
    for name, bar in BARS.items():
        ratio = times["ours"].median_s / times[name].median_s
        parts.append(f"{ratio:.2f} of {name} (bar {bar:g}: {'met' if ratio <= bar else 'missed'})")
    return f"a save blocks training for {', '.join(parts)}"


def _bucket_verdict(blocked: dict[str, Times], with_work: dict[str, Times]) -> str:
    alone, beside = (found["bucket"].median_s / found["folder"].median_s for found in (blocked, with_work))
    met = "met" if max(alone, beside) <= BUCKET_BAR else "missed"
    ratios = f"{alone:.2f} of one to a folder, with the work after it {beside:.2f}"
    return f"a save to a bucket blocks for {ratios} (bar {BUCKET_BAR:g}: {met})"
