"""`clae parity` on ranks: of this machine, or those that torchrun started."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import torch

from clae_dist.config import Config, Parallel
from clae_dist.cores import threads_per_rank
from clae_dist.devices import tf32
from clae_dist.errors import OK, UNEXPECTED, ClaeError, ConfigError
from clae_dist.launchers import torchrun
from clae_dist.launchers.local import spawn
from clae_dist.launchers.rank import Ending
from clae_dist.parity.compare import Parity, compare_steps, difference, table
from clae_dist.parity.observe import observe, reference
from clae_dist.recipe import Recipe
from clae_dist.world import World, connect

FAILED = UNEXPECTED  # the exit code of a comparison that found a difference


def parity(recipe: Recipe, *, world_size: int, rows: int, steps: int, as_json: bool = False) -> Ending:
    """Compare W ranks with one process. The ending's message is the report; its code is 0 when they agree, 1 otherwise.

    Started by torchrun, W is torchrun's number of ranks and `world_size` is not used. Raises ConfigError.
    """
    started = torchrun.num_ranks()
    size = started or world_size
    config = tiny(recipe, world_size=size, rows=rows)
    config.rows_per_rank(size)
    if not started:
        return spawn(size, partial(_rank, as_json=as_json), config, steps)
    return torchrun.say_once(_rank(config, steps, as_json=as_json))


def tiny(recipe: Recipe, *, world_size: int, rows: int) -> Config:
    """The settings with `rows` rows a rank, in float64 (float32 for DeepSpeed) unless the command line names a precision."""
    config = recipe.config
    precision = config.train.precision
    if recipe.origins.get("train.precision") != "command line" or precision == "auto":
        precision = "float32" if config.parallel.backend == "deepspeed" else "float64"
    micro = config.batch.micro_size
    try:
        config.method.for_few_rows(rows * world_size).check_rows(rows, max(1, rows // 2) if micro else 0)
    except ConfigError as error:
        raise ConfigError(f"--rows is {rows}, which does not suit the method ({error}); use an even number.") from None
    if rows % 2 and micro:
        raise ConfigError(f"--rows is {rows}; with batch.micro_size use an even number.")
    return replace(
        config.with_few_rows(rows, world_size),
        optim=replace(config.optim, scaling="none", learning_rate=config.learning_rate()),
        train=replace(config.train, precision=precision),
    )


def alone(config: Config) -> Config:
    """The reference: one process, no wrapper, no micro-batches, the reduce-scatter gather."""
    return replace(
        config,
        batch=replace(config.batch, micro_size=0),
        objective=replace(config.objective, gather="reduce_scatter"),
        parallel=Parallel(),
        train=replace(config.train, compile=False, activation_checkpointing=False),
    )


def _rank(config: Config, steps: int, *, as_json: bool) -> Ending:
    try:
        with connect(device=config.launch.device) as world:
            torch.set_num_threads(threads_per_rank(world.local_size))
            result = examine(config, world, steps)
    except ClaeError as error:
        return Ending(error.exit_code, f"clae: {error}")
    text = json.dumps(result.as_dict(), allow_nan=False) if as_json else "\n".join(table(result))
    return Ending(OK if result.passed else FAILED, text)


def examine(config: Config, world: World, steps: int) -> Parity:
    """Compare the ranks of `world` with one process; the same result on every rank. Collective.

    Raises ConfigError, RankError.
    """
    with tf32(allowed=False):
        here, plain, dtype = World.single(world.device), alone(config), config.train.precision
        one, starts = world.run_on_main(lambda: reference(plain, here, steps, dtype))
        many = observe(config, world, steps, starts)
        freely = observe(config, world, steps)[-1] if steps > 1 else None

        def result() -> Parity:
            single = one if dtype == "float64" else observe(plain, here, steps, starts)
            free = None
            if freely is not None:
                exact = observe(replace(plain, train=replace(plain.train, precision="float64")), here, steps)[-1]
                free = difference(freely.params_after, exact.params_after, dtype)
            return compare_steps(config, world.size, dtype, many, single, one, free)

        parity: Parity = world.run_on_main(result)
        return parity
