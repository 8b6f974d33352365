"""Ranks compared with one process under every backend, and compiled blocks with eager ones."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from clae_dist.config import Parallel
from clae_dist.devices import tf32
from clae_dist.errors import ConfigError
from clae_dist.parity.compare import TOLERANCE, Parity, compare_steps
from clae_dist.parity.observe import observe, reference
from clae_dist.parity.run import alone, examine
from clae_dist.verify.check import Check, Precision, SkippedError, Subject, Verdict
from clae_dist.world import World

_STEPS = 2
_TIMES_ALONE = 3.0  # one process in the same precision is as far from float64; the errors of ranks are others
PRECISIONS: tuple[Precision, ...] = ("float64", "float32", "bfloat16")
_STAGES = range(4)


def backends(subject: Subject) -> dict[str, Parallel]:
    """The backends by name; with --quick, of DeepSpeed only the recipe's stage and 3."""
    own = subject.recipe.config.parallel
    stages = sorted({own.zero_stage, 3}) if subject.quick else _STAGES
    return {
        "ddp": replace(own, backend="ddp"),
        "fsdp2": replace(own, backend="fsdp2"),
        **{f"zero-{stage}": replace(own, backend="deepspeed", zero_stage=stage) for stage in stages},
    }


def parity_checks(subject: Subject) -> Iterator[Check]:
    for name, parallel in backends(subject).items():
        what = f"the recipe on all ranks under {name} and in one process: losses, gradients, attacks, parameters"
        yield Check(f"parity {name}", what, "ranks", _Parity(parallel))


class _Parity:
    """The check of one backend, in every precision that it supports. Collective."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel

    def __call__(self, subject: Subject, world: World) -> Verdict:
        require_backend(self._parallel)
        parities: dict[str, Parity] = {}
        for precision in PRECISIONS:
            if precision == "float64" and self._parallel.backend == "deepspeed":
                continue  # which does not support it
            with skipping_other_backends(self._parallel, subject):
                parities[precision] = examine(subject.tiny(world.size, precision, parallel=self._parallel), world, _STEPS)
        return _verdict(parities)


def _verdict(parities: dict[str, Parity]) -> Verdict:
    problems: list[str] = []
    figures: list[str] = []
    for name, parity in parities.items():
        distance, bound = parity.param_grad.distance, distance_bound(parity)
        if not parity.passed:
            problems.append(f"{name}: {parity.cause}")
        elif not distance <= bound:
            problems.append(f"{name}: the parameter gradient is {distance:.1e} of its length from float64, bound {bound:.0e}")
        figures.append(f"{name} {distance:.1e} (bound {bound:.0e})")
    figure = f"gradient off by {', '.join(figures)}"
    return Verdict.of(problems, figure, **{name: parity.as_dict() for name, parity in parities.items()})


def distance_bound(parity: Parity) -> float:
    """The largest accepted distance of the parameter gradient from that of one process in float64, as a share of its length."""
    return max(TOLERANCE[parity.dtype], _TIMES_ALONE * parity.distance_alone)


def require_backend(parallel: Parallel) -> None:
    """Raise SkippedError if the package of a backend is not installed."""
    if parallel.backend == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise SkippedError("deepspeed is not installed; install the extra deepspeed")


@contextmanager
def skipping_other_backends(parallel: Parallel, subject: Subject) -> Iterator[None]:
    """Context in which a ConfigError skips the check, unless the backend is the recipe's own."""
    try:
        yield
    except ConfigError as error:
        if parallel.backend == subject.recipe.config.parallel.backend:
            raise
        raise SkippedError(str(error)) from None


def compiled(subject: Subject, world: World) -> Verdict:
    """Compiled blocks on all ranks compared with eager ones: as far apart as rounding. Collective."""
    if subject.quick and world.device.type == "cpu":
        raise SkippedError("compiling for a CPU takes minutes; run without --quick")
    _require_compiler(world)
    eager = subject.tiny(world.size, "float32", parallel=Parallel())
    eager = replace(eager, train=replace(eager.train, compile=False, activation_checkpointing=False))
    with tf32(allowed=False):
        plain = alone(eager)
        one, starts = world.run_on_main(lambda: reference(plain, World.single(world.device), _STEPS, "float32"))
        fast = observe(replace(eager, train=replace(eager.train, compile=True)), world, _STEPS, starts)
        slow = observe(eager, world, _STEPS, starts)
    return _verdict({"float32": compare_steps(eager, world.size, "float32", fast, slow, one)})


def _require_compiler(world: World) -> None:
    if world.device.type == "cuda":
        missing = "" if importlib.util.find_spec("triton") else "Triton is not installed"
    else:
        missing = "" if any(map(shutil.which, ("g++", "clang++", "c++"))) else "no C++ compiler (g++)"
    if any(world.flags_anywhere(bool(missing))):
        raise SkippedError(missing or "another rank has no compiler")
