"""`clae bench checkpoint`: how long a save blocks training, compared with torch's and with a copy of the same bytes."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clae_dist.bench.measure import Runs, Say, Times, UnequalError, make_rows, time_in_turns
from clae_dist.bench.outcome import Outcome, amount
from clae_dist.config import Config, Data, Model, Optim, Train
from clae_dist.devices import local_device
from clae_dist.methods.simclr import SimClr
from clae_dist.models import build_model
from clae_dist.parallel import Backend, make_backend
from clae_dist.runs.checkpoint import Writer, load_checkpoint
from clae_dist.runs.folder import RunFolder
from clae_dist.world import World

BARS = {"copy": 1.5, "torch_save": 0.1}  # largest ratio of our time to that of each


@dataclass(frozen=True)
class CheckpointBench:
    """Weights and AdamW's two moments of an encoder: 1.06 GB for ViT-B/16."""

    encoder: str = "timm/vit_base_patch16_224"
    image_size: int = 224
    repeats: int = 5


FULL = CheckpointBench()
QUICK = CheckpointBench("timm/vit_small_patch16_224", 224, 3)  # 0.27 GB


def bench(settings: CheckpointBench, say: Say) -> Outcome:
    """Rows of one case. Raises UnequalError unless the loaded state is, bit for bit, the saved one."""
    device = local_device()
    with tempfile.TemporaryDirectory(prefix="clae-checkpoint-") as folder:
        say(f"making the state of {settings.encoder}, writing to {folder}")
        contest = _Contest(_trained(settings, device), device, Path(folder))
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

    def __init__(self, backend: Backend, device: torch.device, folder: Path) -> None:
        self._backend, self._device, self._folder = backend, device, folder
        self._writer = Writer(folder, 0, 1, "bench", device)
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
        self._writer.join()
        assert not self._writer.problem, self._writer.problem
        if self._future is not None:
            self._future.result()
            self._future = None
        for partial in RunFolder(self._folder).checkpoints.glob("*.partial-*"):
            shutil.rmtree(partial)
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

    def committed_s(self) -> float:
        """Seconds from the start of a save until the checkpoint is committed."""
        self.ready()
        start = time.perf_counter()
        self.ours()
        self._writer.join()
        self._writer.commit(self._step, "ddp", {"images_seen": 0}, 1, 0.0)
        self._writer.join()
        assert not self._writer.problem, self._writer.problem
        return time.perf_counter() - start

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
        return Outcome(rows, self._device, [_verdict(times)])


def _verdict(times: dict[str, Times]) -> str:
    parts = []
    for name, bar in BARS.items():
        ratio = times["ours"].median_s / times[name].median_s
        parts.append(f"{ratio:.2f} of {name} (bar {bar:g}: {'met' if ratio <= bar else 'missed'})")
    return f"a save blocks training for {', '.join(parts)}"
