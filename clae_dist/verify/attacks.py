"""Every method takes a step, and every attack raises its loss within ε."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from clae_dist.config import Config
from clae_dist.contrast.attacks import Attacked
from clae_dist.contrast.look import Look
from clae_dist.methods import KNOWN
from clae_dist.parity.observe import SyntheticRun
from clae_dist.parity.run import tiny
from clae_dist.recipe import recipe_names, resolve
from clae_dist.verify.check import ROWS, Subject, Verdict
from clae_dist.world import World

_SMALL = [
    "model.encoder=small_resnet",
    "data.image_size=16",
    "model.projector_dim=16",
    "train.precision=float32",
    "optim.name=sgd",
    "optim.learning_rate=0.01",
]
_ROUNDING = 1e-5  # of a pixel, and of a loss relative to its size


def check(subject: Subject, world: World) -> Verdict:
    """The recipe's method and attack, every method of the package, and every kind of attack. Collective."""
    problems: list[str] = []
    rows: list[dict[str, Any]] = []
    for name, config in _cases(subject, world.size):
        try:
            row = _examine(config, world)
        except Exception as error:
            error.add_note(f"case: {name}")
            raise
        rows.append({"case": name, **row})
        problems += [f"{name}: {problem}" for problem in row["problems"]]
    raised = [row["raised"] for row in rows if row["raised"] is not None]
    figure = f"{len(rows)} methods and attacks; losses rise by {min(raised):.3g} to {max(raised):.3g}" if raised else ""
    return Verdict.of(problems, figure, rows=rows)


def _cases(subject: Subject, world_size: int) -> Iterator[tuple[str, Config]]:
    yield "the recipe", subject.tiny(world_size, "float32")
    recipes = recipe_names()
    for method in KNOWN:
        own = next((name for name in (f"cifar10/{method}", f"finetune/{method}") if name in recipes), "")
        yield method, _small(world_size, *([own] if own else ["cifar10/clae", f"method.name={method}"]))
    kinds = itertools.product(("fgsm", "pgd"), ("linf", "l2"), ("false", "true"))
    for name, norm, random_start in kinds:
        epsilon = "8/255" if norm == "linf" else "0.5"
        step = ["attack.steps=3", f"attack.step_size={'4/255' if norm == 'linf' else '0.25'}"] if name == "pgd" else []
        settings = [f"attack.name={name}", f"attack.norm={norm}", f"attack.epsilon={epsilon}"]
        start = ", random start" if random_start == "true" else ""
        yield (
            f"{name} {norm}{start}",
            _small(world_size, "cifar10/clae", *settings, *step, f"attack.random_start={random_start}"),
        )


def _small(world_size: int, recipe: str, *settings: str) -> Config:
    found = resolve(recipe, [*_SMALL, *settings])
    if found.config.model.projector != "linear":
        found = resolve(recipe, [*_SMALL, *settings, "model.projector_hidden=16"])
    return tiny(found, world_size=world_size, rows=ROWS)


def _examine(config: Config, world: World) -> dict[str, Any]:
    """Attacks at the initial weights, then a step."""
    run = SyntheticRun(config, world)
    if config.method.num_classes:
        run.step(1)  # a head that starts at zero gives images no gradient
    seen = run.look(0)
    problems: list[str] = []
    raised: float | None = None
    for attacked in seen.attacks:
        excess = world.largest(_excess(seen, attacked))
        if not excess <= _ROUNDING:
            problems.append(f"δ exceeds ε, or a pixel leaves [0, 1], by {excess:.2e}")
        if attacked.loss_at is not None:
            before, after, by_chance = _losses(seen, attacked, world)
            raised = after - before if raised is None else min(raised, after - before)
            if config.attack.epsilon and not after > max(before, by_chance) + _ROUNDING * abs(before):
                texts = f"from {before:.6g} to {after:.6g}; random signs of this size to {by_chance:.6g}"
                problems.append(f"the attack raises the loss less than random signs or not at all ({texts})")
    loss = float(run.step(0).loss)
    if not math.isfinite(loss):
        problems.append(f"the loss of a step is {loss}")
    return {"loss": loss, "attacks": len(seen.attacks), "raised": raised, "problems": problems}


@torch.no_grad()
def _excess(seen: Look, attacked: Attacked) -> float:
    """The largest amount by which δ or a pixel exceeds its bound; 0 or less if none does."""
    ball, images = seen.run.ball, attacked.found.images
    delta = images - attacked.start
    size = delta.abs() if ball.norm == "linf" else delta.flatten(1).norm(dim=1)
    excess = (size - ball.epsilon).max()
    if ball.valid is not None:
        low, high = ball.valid
        excess = torch.stack([excess, low - images.min(), images.max() - high]).max()
    return float(excess)


def _losses(seen: Look, attacked: Attacked, world: World) -> tuple[float, float, float]:
    """The loss that the attack raises, of the global batch: at its start, at the images that it found, and where every pixel
    moves as far up or down by chance."""
    by_chance = seen.loss_under_noise(attacked)
    assert attacked.loss_at is not None
    assert by_chance is not None
    with seen.run.encoding.backend.untouched(), seen.attack_forwards():
        before = attacked.loss_at(lambda start, found: start)
        after = attacked.loss_at(lambda start, found: found)
    first, last, chance = world.mean(torch.stack([loss.detach().double() for loss in (before, after, by_chance)])).tolist()
    return first, last, chance
