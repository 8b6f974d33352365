"""`clae bench checkpoint`: how long a save holds up training, beside torch's, and beside a copy of the same bytes."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clae_dist.bench.measure import Row, Say, Times, UnequalError, time_in_turns, with_ratios
from clae_dist.bench.outcome import Outcome, amount
from clae_dist.config import Config, Model, Optim, Train
from clae_dist.methods.simclr import SimClr
from clae_dist.models import build_model
from clae_dist.parallel import Backend, make_backend
from clae_dist.runs.checkpoint import Writer, load_checkpoint
from clae_dist.runs.folder import RunFolder
from clae_dist.world import World

BARS = {"copy": 1.5, "torch_save": 0.1}  # what ours should take at most, of each


@dataclass(frozen=True)
class CheckpointBench:
    """Weights and AdamW's two moments of an encoder: 1.06 GB of ViT-B/16's."""

    encoder: str = "timm/vit_base_patch16_224"
    image_size: int = 224
    repeats: int = 5


QUICK = CheckpointBench("timm/vit_small_patch16_224", 224, 3)  # 0.27 GB


def bench(settings: CheckpointBench, device: torch.device, say: Say) -> Outcome:
    """Rows of one case. Raises UnequalError when what is loaded back is not, bit for bit, what was saved."""
    with tempfile.TemporaryDirectory(prefix="clae-checkpoint-") as folder:
        say(f"making the state of {settings.encoder}, writing to {folder}")
        contest = _Contest(_trained(settings, device), device, Path(folder))
        contest.check()
        say("what is loaded back is equal; timing")
        return contest.outcome(settings)


def _trained(settings: CheckpointBench, device: torch.device) -> Backend:
    """A backend after one step of the optimiser, on made-up gradients."""
    config = Config(
        model=Model(encoder=settings.encoder),
        method=SimClr.Settings(),
        optim=Optim(name="adamw"),
        train=Train(precision="float32"),
    )
    config = replace(config, data=replace(config.data, image_size=settings.image_size))
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

    # ---- what is timed ----

    def ours(self) -> None:
        self._step = next(self._steps)
        self._writer.begin(self._step, self._backend.pieces())

    def copy(self) -> None:
        self._target.copy_(self._source)

    def torch_save(self, sync: bool = False) -> None:
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
        """Waits for what others do in the background."""
        self._writer.join()
        assert not self._writer.problem, self._writer.problem
        if self._future is not None:
            self._future.result()
            self._future = None
        for partial in RunFolder(self._folder).checkpoints.glob("*.partial-*"):
            shutil.rmtree(partial)
        os.sync()

    # ---- the same bits, then the time ----

    def check(self) -> None:
        self.committed_s()
        found = load_checkpoint(self._folder, lambda text: None)
        self.torch_save()
        theirs = torch.load(self._folder / "state.pt", map_location="cpu", weights_only=True)
        for name, value in self._plain().items():
            if found is None or not torch.equal(found[name], value.cpu()) or not torch.equal(theirs[name], value.cpu()):
                raise UnequalError(f"{name} is not what was saved; a time of it would say nothing.")

    def committed_s(self) -> float:
        """From the beginning of a save until the checkpoint has its name."""
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
        found = load_checkpoint(self._folder, lambda text: None)
        assert found is not None
        runs: dict[str, tuple[str, Callable[[], None]]] = {
            "ours": ("what a save holds up; the rest is in the background", self.ours),
            "copy": ("of the same bytes in one row, into memory that is there", self.copy),
            "torch_save": ("whole, without fsync", self.torch_save),
            "torch_save_fsync": ("whole, until it is on the disk", lambda: self.torch_save(sync=True)),
            "async_save": ("torch.distributed.checkpoint's, on one process: what it holds up", self.async_save),
        }
        times = time_in_turns(
            {name: run for name, (_, run) in runs.items()}, self._device, settings.repeats, ready=self.ready, at_least_s=0.0
        )
        self.ready()
        more = {"ours": {"committed_s": committed_s, "written_bytes": float(found.index.num_bytes)}}
        case = f"{settings.encoder}, weights and AdamW's state: {amount(self._num_bytes)}"
        rows = with_ratios(
            [
                Row(case, f"{name}: {note}", times[name].median_s, times[name].spread, {}, times["copy"].median_s)
                for name, (note, _) in runs.items()
            ]
        )
        rows = [replace(row, more=row.more | more.get(row.name, {})) for row in rows]
        return Outcome(rows, self._device, [_verdict(times)])


def _verdict(times: dict[str, Times]) -> str:
    ours = times["ours"].median_s
    said = []
    for name, bar in BARS.items():
        ratio = ours / times[name].median_s
        said.append(f"{ratio:.2f} of {name} (bar {bar:g}: {'held' if ratio <= bar else 'missed'})")
    return f"a save holds up training for {', '.join(said)}"
