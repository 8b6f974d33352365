"""Checkpoints saved under one backend and loaded under another, as a run loads them: equal weights and optimiser state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from clae_dist.config import Parallel
from clae_dist.errors import CheckpointError, ConfigError
from clae_dist.parity.observe import SyntheticRun
from clae_dist.runs.checkpoint import SharedCheckpoint, Writer, load_checkpoint, sections
from clae_dist.verify.check import SkippedError, Subject, Verdict
from clae_dist.verify.equality import backends, require_backend
from clae_dist.wording import count_of
from clae_dist.world import World

_ATTEMPT = "verify"


def check(subject: Subject, world: World) -> Verdict:
    """Save after one step under each backend, load under the next one (with --quick) or under every other. Collective."""
    problems: list[str] = []
    skipped: dict[str, str] = {}
    saved: dict[str, Path] = {}
    tensors = 0
    for name, parallel in backends(subject).items():
        folder = subject.work / "saved" / name
        try:
            require_backend(parallel)
            state = _save(subject, parallel, folder, world)
        except (SkippedError, ConfigError) as error:
            skipped[name] = str(error)
            continue
        saved[name] = folder
        tensors = len(state)
        problems += [f"{name}: {problem}" for problem in _unequal(state, _flat(_loaded(folder, world)))]
    moves = list(_moves(list(saved), subject.quick))
    for before, after in moves:
        run = SyntheticRun(subject.tiny(world.size, "float32", parallel=backends(subject)[after]), world)
        loaded = _loaded(saved[before], world)
        run.load(loaded)
        problems += [f"{before} to {after}: {problem}" for problem in _unequal(_flat(run.state()), _flat(loaded))]
    counts = [
        count_of(len(saved), "backend"),
        count_of(len(moves), "move"),
        f"{count_of(tensors, 'tensor')} with the same bits",
    ]
    figure = ", ".join(counts)
    return Verdict.of(problems, "" if problems else figure, moves=moves, skipped=skipped, tensors=tensors)


def _moves(names: list[str], quick: bool) -> Iterator[tuple[str, str]]:
    for place, before in enumerate(names):
        others = [name for name in names if name != before]
        yield from ((before, after) for after in (others[place % len(others) :][:1] if quick and others else others))


def _save(subject: Subject, parallel: Parallel, folder: Path, world: World) -> dict[str, torch.Tensor]:
    """Take a step, write a checkpoint, and return the saved state."""
    run = SyntheticRun(subject.tiny(world.size, "float32", parallel=parallel), world)
    run.step(0)
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    world.flags_anywhere(False)
    writer = Writer(folder, world.rank, world.size, _ATTEMPT, world.device)
    writer.begin(1, run.backend.pieces())
    writer.join()
    world.raise_together(CheckpointError, writer.problem)
    if world.is_main:
        writer.commit(1, parallel.backend, {"images_seen": 0}, 1, 0.0)
        writer.join()
    world.raise_together(CheckpointError, writer.problem)
    return _flat(run.state())


def _loaded(folder: Path, world: World) -> dict[str, Any]:
    """The state in the folder's checkpoint, each tensor read by one rank and sent to the others. Collective."""
    damaged: list[str] = []
    checkpoint = load_checkpoint(folder, damaged.append, world)
    if checkpoint is None:
        raise CheckpointError(f"no checkpoint could be read from {folder}: {' '.join(damaged) or 'the folder is empty'}")
    shared = SharedCheckpoint(checkpoint, world)
    tensors = dict(shared)
    shared.agree()
    return sections(tensors)


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a nested state by path."""
    flat: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        path = f"{prefix}{name}"
        flat.update(_flat(value, f"{path}/") if isinstance(value, Mapping) else {path: value})
    return flat


def _unequal(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """One line about the tensors that differ; none if all are equal."""
    names = [
        name
        for name in dict.fromkeys([*expected, *state])
        if name not in state or name not in expected or not torch.equal(state[name].cpu(), expected[name].cpu())
    ]
    return [f"{count_of(len(names), 'tensor')} differ, {names[0]} first"] if names else []
