"""`clae replay RUN/nonfinite/step-…`: repeat a recorded step with a non-finite loss or gradient, and name the first module
with a non-finite output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from clae_dist.config import Config, Data, Parallel
from clae_dist.contrast.step import NonFinite, pretrain_step
from clae_dist.data.loader import load
from clae_dist.data.shards import ShardReader
from clae_dist.devices import tf32
from clae_dist.errors import ConfigError
from clae_dist.escape import shown
from clae_dist.models import build_model
from clae_dist.parallel import make_backend
from clae_dist.reading import Check, ReadError, expect, is_count, is_list_of, is_number, is_text, open_regular, read_object
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.pseudo_labels import read_pseudo_labels
from clae_dist.runs.trust import NOTHING, Permission, open_run
from clae_dist.training.clock import Clock
from clae_dist.training.nonfinite import loss_parts
from clae_dist.training.plan import Plan
from clae_dist.training.pretraining import make_pretraining, seed_step
from clae_dist.training.session import Session
from clae_dist.training.sets import open_sets
from clae_dist.world import World

_CLOSE = {"bfloat16": 0.05, "float32": 1e-3, "float64": 1e-6}  # relative; another number of ranks adds in another order


def _is_any_number(value: Any) -> bool:
    return type(value) in (int, float)


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_any_number, value.values()))


def _is_rank(value: Any) -> bool:
    return isinstance(value, dict) and _numbers(value.get("loss")) and is_list_of(is_text)(value.get("images"))


_FIELDS: dict[str, Check] = {
    "step": is_count,
    "world_size": lambda value: is_count(value) and 0 < value <= 1 << 20,
    "learning_rate": is_number,
    "problem": is_text,
    "precision": lambda value: is_text(value) and value in _CLOSE,
    "gradient_norms": _numbers,
    "ranks": lambda value: is_list_of(_is_rank)(value) and len({frozenset(rank["loss"]) for rank in value}) == 1,
}


@dataclass(frozen=True)
class Replay:
    """The result of the repeated step."""

    reproduced: bool
    text: str


def read_step(folder: Path, shards: str, permission: Permission = NOTHING) -> tuple[Config, dict[str, Any]]:
    """The settings of the step's run, for a replay, and what was written down. Raises ConfigError where nothing was, and for
    settings of the run that `permission` does not cover (runs/trust.py)."""
    try:
        open_regular(folder / "step.json").close()
        config = open_run(folder.parents[1], permission).to_read_images(shards, mixture=True)
        wanted = read_object(folder / "step.json", nan=True)
        expect(wanted, _FIELDS)
    except ReadError as error:
        raise ConfigError(
            f"STEP is {str(folder)!r}, which cannot be read ({error}); name a folder such as runs/clae/nonfinite/step-00000123."
        ) from None
    data: Data = replace(config.data, workers=0, verify="size")
    train = replace(config.train, precision=wanted["precision"], compile=False)
    return replace(config, data=data, train=train, parallel=Parallel()), wanted


def num_ranks(config: Config, wanted: dict[str, Any]) -> int:
    """How many ranks a replay needs: one holds the whole batch, unless batch statistics were those of some ranks."""
    return int(wanted["world_size"]) if config.model.statistics_differ else 1


def _tensors(path: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a recorded step, which have the names and shapes of `expected`. Raises ConfigError."""
    try:
        open_regular(path).close()
        tensors = load_file(path)
    except (ReadError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
    else:
        if {name: value.shape for name, value in tensors.items()} == {name: value.shape for name, value in expected.items()}:
            return tensors
        reason = "its tensors have other names or shapes than those of the recipe"
    raise ConfigError(f"STEP is {str(path.parent)!r}, whose {path.name} cannot be used ({reason}).")


def replay(config: Config, wanted: dict[str, Any], folder: Path, world: World) -> Replay:
    """Takes the step again, on every rank of `world`. A collective. Raises ConfigError and DataError."""
    step = int(wanted["step"])
    train = open_sets(Session(config, world, say=lambda text: None)).train
    model = build_model(config, world.norm_group(config.model.norm_group))
    model.load_state_dict(_tensors(folder / "model.safetensors", model.state_dict()))
    backend = make_backend(config, model, world)
    for name, value in _tensors(folder / "method.safetensors", backend.method_state).items():
        backend.method_state[name].copy_(value)
    backend.load_key_weights(_tensors(folder / "keys.safetensors", backend.key_weights()))
    backend.model.train()
    backend.set_learning_rate(wanted["learning_rate"])
    num_images, counts = train.num_samples(config.data.train_split), config.method.cluster_counts
    labels = read_pseudo_labels(RunFolder(folder.parents[1]), num_images, counts) if counts else None
    run = make_pretraining(config, world, backend, Clock(world.device), labels)
    moment = Plan.of(config, num_images).moment(step)
    (batch,) = load(train, config, world, step, step + 1)
    reader = ShardReader(train, config.data.train_split)
    mine = [reader.name_of(sample) for sample in batch.ids.tolist()]
    images = [name for names in world.gather_objects(mine) for name in names]
    seed_step(config, step, world.rank)
    problem = ""
    with tf32(allowed=config.train.tf32), _first_not_finite(backend.model) as first:
        try:
            metrics = pretrain_step(run, batch, moment)
            if not metrics.taken:
                problem = "the gradient is not finite"
        except NonFinite as error:
            problem, metrics = str(error), error.metrics
    norms = backend.gradient_norms() if problem else {}
    parts = _mean(world.gather_objects(loss_parts(metrics)))
    before = _mean([rank["loss"] for rank in wanted["ranks"]])
    named = sorted(name for rank in wanted["ranks"] for name in rank["images"])
    checks = {
        "the images": sorted(images) == named,
        "a non-finite number": bool(problem),
        "the parts of the loss": all(_same(parts.get(name), value, wanted["precision"]) for name, value in before.items()),
        "the gradients": all(_same(norms.get(name), value, wanted["precision"]) for name, value in _known(wanted, problem)),
    }
    lines = [f"step {step + 1}, {len(images)} images, learning rate {wanted['learning_rate']:.4g}: {wanted['problem']}"]
    lines += [f"  {name:<12} {value:.6g} then, {parts.get(name, math.nan):.6g} now" for name, value in before.items()]
    lines += [
        f"  gradient of {name}: {value:.6g} then, {norms.get(name, math.nan):.6g} now"
        for name, value in list(wanted["gradient_norms"].items())[:3]
    ]
    places = [place for place in world.gather_objects(first[0] if first else "") if place]
    lines.append(f"first that is not finite: {places[0] if places else 'no module in the forward pass'}")
    failed = [name for name, passed in checks.items() if not passed]
    lines.append(f"not reproduced: {', '.join(failed)} differ" if failed else "reproduced")
    return Replay(not failed, "\n".join(map(shown, lines)))


def _known(wanted: dict[str, Any], problem: str) -> list[tuple[str, float]]:
    return list(wanted["gradient_norms"].items()) if problem else []


def _mean(parts: list[dict[str, float]]) -> dict[str, float]:
    """The loss of the global batch from those of the ranks."""
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}


def _same(now: float | None, then: float, precision: str) -> bool:
    if now is None:
        return False
    if not math.isfinite(then):  # which of NaN and infinity it is depends on the order of summation
        return not math.isfinite(now)
    return math.isclose(now, then, rel_tol=_CLOSE[precision], abs_tol=_CLOSE[precision])


@contextmanager
def _first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Context that yields a list, filled with the first module whose output is non-finite, and its other non-finite tensors."""
    found: list[str] = []

    def look(name: str, kind: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if found or _finite(output):
                return
            weights = [key for key, value in module.named_parameters(recurse=False) if not _finite(value)]
            causes = [*(f"its {key}" for key in weights), *(["its input"] if not all(map(_finite, inputs)) else [])]
            found.append(
                f"the output of {name} ({kind}; not finite as well: {', '.join(causes) or 'nothing, so it overflows'})"
            )

        return hook

    handles = [
        module.register_forward_hook(look(name or "the model", type(module).__name__)) for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or not value.is_floating_point() or bool(value.detach().isfinite().all())
