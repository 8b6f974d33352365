"""`clae bench`: time, memory and counts of loss, gather, step, data and checkpoints, beside other packages and a bound."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

from clae_dist.bench.measure import Say


def run_bench(name: str, *, quick: bool, as_json: bool, progress: Say, **options: Any) -> int:
    """Measure and print a table or JSON. Returns 0. Raises UnequalError when contenders compute different results.

    Args:
        name: a module of this folder with `FULL` and `QUICK`, its settings, and `bench(settings, progress)`.
        options: fields of the settings with other values.
    """
    module = importlib.import_module(f"clae_dist.bench.{name}")
    outcome = module.bench(replace(module.QUICK if quick else module.FULL, **options), progress)
    if outcome is not None:  # otherwise this is a rank of torchrun other than the first
        print(outcome.as_json() if as_json else outcome.as_table())
    return 0
