"""The checks of `clae verify` in their order: what later ones need comes first."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence

from clae_dist.errors import ConfigError
from clae_dist.verify import attacks, augmentation, checkpoints, collectives, equality, host, norms, resume
from clae_dist.verify.check import Check, Subject


def checks(subject: Subject, only: Sequence[str] = ()) -> list[Check]:
    """All checks, or those whose names match one of the patterns `only`. Raises ConfigError for a pattern without a match."""
    every = list(_every(subject))
    names = [check.name for check in every]
    for pattern in only:
        if not any(_matches(name, pattern) for name in names):
            raise ConfigError(f"--only names {pattern!r}; expected one of {', '.join(names)}.")
    return [check for check in every if not only or any(_matches(check.name, pattern) for pattern in only)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.partition(" ")[0] == pattern


def _every(subject: Subject) -> Iterator[Check]:
    yield Check("doctor", "versions, devices, limits, disks, data and tracking of the recipe", "host", host.doctor)
    yield Check(
        "collectives", "all-gather, all-reduce, reduce-scatter, broadcast: values, time, rate", "ranks", collectives.check
    )
    yield Check("batch norm", "statistics of all ranks against one process in float64", "ranks", norms.check)
    yield Check("augmentation", "that of the device against that of the CPU in float64", "ranks", augmentation.check)
    yield from equality.parity_checks(subject)
    yield Check("attacks", "every method takes a step, every attack raises its loss within ε", "ranks", attacks.check)
    yield Check("checkpoints", "saved under one backend, loaded under another", "ranks", checkpoints.check)
    yield Check("compile", "compiled blocks against eager ones", "ranks", equality.compiled)
    yield Check("resume", "a run is killed and resumed: the bits of an undisturbed one", "host", resume.check)
    yield Check("bench gpu-counts", "kernels, collectives and host waits of a step on a GPU", "host", host.bench_gpu_counts)
    yield Check("bench step", "time of a training step by method", "host", host.bench_step)
    yield Check("bench data", "time from shards to views", "host", host.bench_data)
