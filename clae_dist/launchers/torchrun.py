"""Ranks that torchrun started: `torchrun … -m clae_dist train CONFIG --launcher torchrun`."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from clae_dist.config import Config
from clae_dist.errors import BAD_CONFIG, FAILED, UNEXPECTED, ConfigError, restarts
from clae_dist.launchers.rank import Ending, RankBroke, run_rank
from clae_dist.launchers.terminal import lines_shown_on_stdout
from clae_dist.recipe import Recipe
from clae_dist.runs.ends import read_ends
from clae_dist.runs.mirror import fetch_ends
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
        lines, again = lines_shown_on_stdout(os.environ["RANK"]), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        # Of a start that torchrun has made again, one of the ends so far is its own. Rank 0's number counts: a host that
        # joined later was never started again, and all ranks must ask alike.
        if os.environ["RANK"] == "0":
            fetch_ends(recipe.config.folder)
        num_ends = len(read_ends(recipe.config.folder)) - again
        return say_once(_for_good(run_rank(recipe, lines, debug=debug, num_ends=num_ends)))
    except ConfigError as error:
        return say_once(Ending(BAD_CONFIG, str(error)))
    except RankBroke as error:  # torchrun sees only the code
        _leave_code(recipe.config)
        return Ending(error.exit_code, str(error), again=True)


def _for_good(ending: Ending) -> Ending:
    """The ending of all ranks together. For a crash that would only be repeated, the code is one that ends torchrun, too."""
    return replace(ending, code=FAILED) if restarts(ending.code) else ending


def _leave_code(config: Config) -> None:
    """Leave the exit code for launch/torchrun.sh, if it asked for it, in case torchrun does not start the ranks again."""
    path, ends = os.environ.get("CLAE_ENDING", ""), read_ends(config.folder)
    if path and ends:
        with suppress(OSError):
            Path(f"{path}.failed").write_text(f"{FAILED if ends[-1].code == UNEXPECTED else ends[-1].code}\n")


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
