"""Checks with planted faults, and the subject that tests verify."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from clae_dist.parity.run import tiny
from clae_dist.recipe import resolve
from clae_dist.verify.check import Check, SkippedError, Subject, Verdict
from clae_dist.world import World

SMALL = ["model.encoder=small_resnet", "data.image_size=16", "model.projector_dim=16", "model.projector_hidden=16"]
SGD = ["optim.name=sgd", "optim.learning_rate=0.03", "optim.warmup_epochs=0"]


def subject(folder: Path, limit_s: float = 60.0, quick: bool = True) -> Subject:
    recipe = resolve(None, [*SMALL, *SGD])
    assert tiny(recipe, world_size=2, rows=4)
    return Subject(recipe, (), folder, 2, "cpu", quick, limit_s)


def passes(subject: Subject, world: World) -> Verdict:
    return Verdict("pass", f"{world.size} ranks", figures={"sum": float(world.largest(world.rank))})


def differs(subject: Subject, world: World) -> Verdict:
    return Verdict.of([f"planted on {world.rank}"] if world.rank else [], "1e-3")


def raises_alone(subject: Subject, world: World) -> Verdict:
    if world.rank == 1:
        raise ValueError("planted")
    world.largest(0.0)  # waits for rank 1
    return Verdict("pass")


def is_killed(subject: Subject, world: World) -> Verdict:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.largest(0.0)
    return Verdict("pass")


def hangs(subject: Subject, world: World) -> Verdict:
    if world.rank == 1:
        time.sleep(3600)
    world.largest(0.0)
    return Verdict("pass")


def does_not_apply(subject: Subject, world: World) -> Verdict:
    raise SkippedError("planted")


def interrupted(subject: Subject) -> Verdict:
    raise KeyboardInterrupt


def on_ranks(run: Any, name: str = "") -> Check:
    return Check(name or run.__name__, "planted", "ranks", run)


def on_host(run: Any) -> Check:
    return Check(run.__name__, "planted", "host", run)
