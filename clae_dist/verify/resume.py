"""A training run that is killed and resumed ends with the bits of an undisturbed one."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from clae_dist.config import Checkpointing, Launch, Tracking
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.recipe import to_yaml
from clae_dist.runs.checkpoint import Checkpoint, load_checkpoint
from clae_dist.runs.folder import RunFolder
from clae_dist.verify.check import ROWS, Subject, Verdict
from clae_dist.verify.program import CommandError, clae, started
from clae_dist.wording import count_of

_STEPS, _EVERY = 24, 4  # of the run; between its checkpoints
_KILL_AFTER = 9  # steps: between two checkpoints
_POLL_S = 0.01


def check(subject: Subject) -> Verdict:
    """Train once undisturbed, once with kill -9 of launcher and ranks, and compare the last checkpoints."""
    recipe = _write_recipe(subject)
    undisturbed, killed = subject.work / "undisturbed", subject.work / "killed"
    _train(recipe, undisturbed, subject)
    step = _kill(recipe, killed, subject)
    _train(recipe, killed, subject)
    if "resuming after step" not in RunFolder(killed).console_file.read_text():
        return Verdict("fail", reason="the killed run began again from the start: it found no checkpoint")
    return _compare(undisturbed, killed, step)


def _write_recipe(subject: Subject) -> Path:
    """The recipe with few rows, on images of noise."""
    few = subject.recipe.config.with_few_rows(ROWS, subject.workers)
    size = few.batch.global_size
    shards = subject.work / "shards"
    if not shards.exists():
        write_synthetic_set(shards, 4 * size, few.data.image_size)
    gpu = subject.device != "cpu" and torch.cuda.is_available()
    config = replace(
        few,
        data=replace(few.data, shards=str(shards.absolute()), verify="size", mixture={}),
        optim=replace(few.optim, warmup_epochs=0.0),
        train=replace(
            few.train,
            epochs=_STEPS / 4,
            knn_every=0.0,
            log_every=1,
            diagnose_every=10 * _STEPS,
            parent="",
            deterministic=gpu or few.train.deterministic,
        ),
        checkpoint=Checkpointing(every_steps=_EVERY),
        launch=Launch(launcher="local", workers=subject.workers, device=subject.device, max_failures=0),
        tracking=Tracking(name="none"),
    )
    path = subject.work / "resume.yaml"
    path.write_text(to_yaml(config))
    return path


def _train(recipe: Path, run: Path, subject: Subject) -> None:
    done = clae(["train", recipe, f"run_dir={run.absolute()}"], subject.limit_s)
    if done.code:
        raise CommandError(done.problem("clae train"))


def _kill(recipe: Path, run: Path, subject: Subject) -> int:
    """Train until a step between two checkpoints, then kill the launcher, with which its ranks end. Returns the step."""
    deadline = time.monotonic() + subject.limit_s
    with started(["train", recipe, f"run_dir={run.absolute()}"]) as (process, _, stderr):
        while (step := _step(run)) < _KILL_AFTER:
            if process.poll() is not None or time.monotonic() > deadline:
                raise CommandError(f"the run to be killed stood at step {step}: {stderr.read_text()[-300:]}")
            time.sleep(_POLL_S)
    if process.returncode != -9:
        raise CommandError(f"the run had ended with exit code {process.returncode} before it could be killed")
    return _step(run)


def _step(run: Path) -> int:
    """The step of the newest line of metrics; 0 before the first."""
    try:
        text = RunFolder(run).metrics_file.read_text()
    except FileNotFoundError:
        return 0
    lines = text[: text.rfind("\n") + 1].splitlines()
    return int(json.loads(lines[-1]).get("step", 0)) if lines else 0


def _last(run: Path) -> Checkpoint:
    damaged: list[str] = []
    checkpoint = load_checkpoint(run, damaged.append)
    if checkpoint is None or checkpoint.step != _STEPS:
        raise CommandError(f"{run} has no checkpoint of step {_STEPS}: {' '.join(damaged)}")
    return checkpoint


def _compare(undisturbed: Path, killed: Path, step: int) -> Verdict:
    expected, resumed = _last(undisturbed), _last(killed)
    names = list(dict.fromkeys([*expected, *resumed]))
    different = [
        name for name in names if name not in expected or name not in resumed or not torch.equal(expected[name], resumed[name])
    ]
    problems = [f"{len(different)} of {count_of(len(names), 'tensor')} differ, {different[0]} first"] if different else []
    figure = f"kill -9 after step {step} of {_STEPS}: {count_of(len(names), 'tensor')} with the same bits"
    return Verdict.of(problems, "" if problems else figure, step=step, tensors=len(names), different=different)
