"""Ranks that torchrun started: `torchrun … -m clae_dist train CONFIG --launcher torchrun`."""

from __future__ import annotations

import os
import sys

from clae_dist.config import Config, ConfigError
from clae_dist.launchers.rank import Ending, RankBroke, run_rank


def launch(config: Config, origins: dict[str, str], debug: bool) -> Ending:
    """Trains as the rank that torchrun's environment names. Raises ConfigError outside of torchrun."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "launch.launcher is 'torchrun', but RANK and WORLD_SIZE are not set; "
            "start with `torchrun --nproc-per-node=2 -m clae_dist train CONFIG --launcher torchrun`, or use --launcher local."
        )
    is_main = os.environ["RANK"] == "0"
    try:
        ending = run_rank(config, origins, debug, sys.stdout if is_main else None)
    except RankBroke as error:
        return Ending(error.code, str(error))
    return ending if is_main else Ending(ending.code, "")  # all ranks raise the same; one says it
