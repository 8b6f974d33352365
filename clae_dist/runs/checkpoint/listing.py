"""`clae checkpoints RUN`: list checkpoints, verify them, and export one as a single file."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clae_dist.errors import ConfigError, DamagedError
from clae_dist.runs.checkpoint.objects import stage_checkpoints
from clae_dist.runs.checkpoint.read import Checkpoint
from clae_dist.runs.checkpoint.safetensors_file import Spec, write_safetensors
from clae_dist.runs.folder import RunFolder, step_of
from clae_dist.staging import shown_path
from clae_dist.storage import writing

NEWEST = -1
Say = Callable[[str], None]


@dataclass(frozen=True)
class Line:
    """A checkpoint in the list. None: unknown, since checkpoint.json is damaged; `intact`: not verified."""

    step: int
    path: str
    images_seen: int | None = None
    saved: float | None = None  # seconds since 1970
    num_bytes: int | None = None
    world_size: int | None = None
    backend: str | None = None
    intact: bool | None = None
    problem: str = ""


def list_checkpoints(run_dir: Path, *, verify: bool) -> list[Line]:
    """The checkpoints of a run, newest first; `verify` reads every byte. Raises ConfigError without a run folder."""
    folder = RunFolder(run_dir)
    folder.require()
    stage_checkpoints(run_dir)
    return [_line(path, verify=verify) for path in folder.find_checkpoints()]


def _line(path: Path, *, verify: bool) -> Line:
    line = Line(step_of(path), shown_path(path))
    try:
        checkpoint = Checkpoint(path)
        index = checkpoint.index
        line = dataclasses.replace(
            line,
            images_seen=index.info["images_seen"],
            saved=index.saved,
            num_bytes=index.num_bytes,
            world_size=index.world_size,
            backend=index.backend,
        )
        if verify:
            checkpoint.verify()
            line = dataclasses.replace(line, intact=True)
    except DamagedError as error:
        line = dataclasses.replace(line, intact=False, problem=str(error))
    return line


def say_checkpoints(run_dir: Path, *, verify: bool, as_json: bool, say: Say) -> int:
    """Print the list as a table or one JSON array; returns 1 if one is damaged, else 0."""
    lines = list_checkpoints(run_dir, verify=verify)
    if as_json:
        say(json.dumps([dataclasses.asdict(line) for line in lines], indent=1))
    else:
        say(f"{'step':>10}{'images seen':>15}{'age':>10}{'size':>12}  saved by")
        for line in lines:
            say(_text(line))
        if not lines:
            say("no checkpoint yet")
    return 1 if any(line.intact is False for line in lines) else 0


def _text(line: Line) -> str:
    if line.saved is None or line.num_bytes is None:
        return f"{line.step:>10,}  damaged: {line.problem}"
    state = "" if line.intact is None else "; intact" if line.intact else f"; damaged: {line.problem}"
    ranks = f"{line.world_size} rank{'' if line.world_size == 1 else 's'}"
    return (
        f"{line.step:>10,}{line.images_seen:>15,}{_age(time.time() - line.saved):>10}{line.num_bytes / 1e6:>9,.1f} MB"
        f"  {ranks}, {line.backend}{state}"
    )


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def export_checkpoint(run_dir: Path, step: int, destination: Path) -> Path:
    """Write the full tensors of the checkpoint of `step` (or the NEWEST) as one safetensors file, atomically.

    Raises: ConfigError for a step without a checkpoint or a damaged one, StorageError if the file cannot be written.
    """
    stage_checkpoints(run_dir)
    paths = {step_of(path): path for path in RunFolder(run_dir).find_checkpoints()}
    chosen = max(paths, default=NEWEST) if step == NEWEST else step
    if chosen not in paths:
        there = f"it has {', '.join(map(str, sorted(paths)))}" if paths else "it has none"
        asked = "" if step == NEWEST else f" of step {step}"
        raise ConfigError(f"RUN is {shown_path(run_dir)!r}, which has no checkpoint{asked}; {there}.")
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        checkpoint = Checkpoint(paths[chosen])
        checkpoint.verify()
        specs = [Spec(name, tensor.shape, tensor.dtype) for name, tensor in checkpoint.index.tensors.items()]
        about = {"step": str(checkpoint.step), "images_seen": str(checkpoint.info["images_seen"])}
        with writing(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(partial, specs, (checkpoint[spec.name] for spec in specs), about)
            partial.replace(destination)
    except DamagedError as error:
        raise ConfigError(
            f"the checkpoint of step {chosen} is damaged: {error}; `clae checkpoints {shown_path(run_dir)} --verify` lists the "
            "intact ones."
        ) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return destination
