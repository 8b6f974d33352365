"""Ranks that torchrun started: `torchrun … -m clae_dist train CONFIG --launcher torchrun`."""

from __future__ import annotations

import os

from clae_dist.config import Config
from clae_dist.errors import BAD_CONFIG, ConfigError
from clae_dist.launchers.rank import Ending, RankBroke, run_rank
from clae_dist.launchers.terminal import lines_shown_on_stdout
from clae_dist.recipe import Recipe
from clae_dist.wording import count_of


def launch(recipe: Recipe, *, debug: bool = False) -> Ending:
    """Train as the rank that torchrun's environment names. Raises ConfigError outside of torchrun."""
    if not num_ranks():
        raise ConfigError(
            "launch.launcher is 'torchrun', but RANK and WORLD_SIZE are not set; "
            "start with `torchrun --nproc-per-node=2 -m clae_dist train CONFIG --launcher torchrun`, or use --launcher local."
        )
    try:
        _check_elastic(recipe.config)
        return say_once(run_rank(recipe, lines_shown_on_stdout(os.environ["RANK"]), debug=debug))
    except ConfigError as error:
        return say_once(Ending(BAD_CONFIG, str(error)))
    except RankBroke as error:  # torchrun sees only the code
        return Ending(error.exit_code, str(error), again=True)


def _check_elastic(config: Config) -> None:
    """Raises ConfigError when a number of hosts that the run may come to (CLAE_NODES, "MIN:MAX") cannot share a batch."""
    low, _, high = os.environ.get("CLAE_NODES", "").partition(":")
    if not high:
        return
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    sizes = [hosts * per_host for hosts in range(int(low), int(high) + 1)]
    if wrong := [size for size in sizes if not config.works_on(size)]:
        raise ConfigError(
            f"--nodes is {low}:{high} with {count_of(per_host, 'rank')} each, but {' or '.join(map(str, wrong))} ranks cannot "
            f"share batch.global_size {config.batch.global_size} in {config.num_streams} streams, and torchrun takes any "
            "number between; use another range or batch.global_size, or Ray, which is told which numbers work "
            "(launch.min_workers)."
        )


def num_ranks() -> int:
    """How many ranks torchrun started, this process being one; 0 when it did not."""
    return int(os.environ.get("WORLD_SIZE", "0")) if "RANK" in os.environ else 0


def say_once(ending: Ending) -> Ending:
    """All ranks end alike; the first says it."""
    return Ending(ending.code, ending.message if os.environ["RANK"] == "0" else "")
