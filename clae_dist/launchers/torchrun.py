"""Ranks that torchrun started: `torchrun … -m clae_dist train CONFIG --launcher torchrun`."""

from __future__ import annotations

import os
import sys

from clae_dist.config import Config, ConfigError
from clae_dist.launchers.rank import Ending, RankBroke, run_rank


def launch(config: Config, origins: dict[str, str], debug: bool) -> Ending:
    """Trains as the rank that torchrun's environment names. Raises ConfigError outside of torchrun."""
    if not num_ranks():
        raise ConfigError(
            "launch.launcher is 'torchrun', but RANK and WORLD_SIZE are not set; "
            "start with `torchrun --nproc-per-node=2 -m clae_dist train CONFIG --launcher torchrun`, or use --launcher local."
        )
    try:
        return say_once(run_rank(config, origins, debug, sys.stdout if os.environ["RANK"] == "0" else None))
    except RankBroke as error:
        return Ending(error.code, str(error))


def num_ranks() -> int:
    """How many ranks torchrun started, this process being one; 0 when it did not."""
    return int(os.environ.get("WORLD_SIZE", "0")) if "RANK" in os.environ else 0


def say_once(ending: Ending) -> Ending:
    """All ranks end alike; the first says it."""
    return ending if os.environ["RANK"] == "0" else Ending(ending.code, "")
