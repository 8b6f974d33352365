"""`clae replay` on ranks of this machine, or in this process."""

from __future__ import annotations

from pathlib import Path

import torch

from clae_dist.cores import threads_per_rank
from clae_dist.errors import OK, UNEXPECTED, ClaeError
from clae_dist.escape import shown
from clae_dist.launchers.local import spawn
from clae_dist.launchers.rank import Ending
from clae_dist.runs.trust import NOTHING, Permission
from clae_dist.training.replay import num_ranks, read_step, replay
from clae_dist.world import connect


def replay_step(folder: Path, shards: str = "", permission: Permission = NOTHING) -> Ending:
    """Takes a step again that `folder` describes; code 0 when it is as it was, 1 when not. Raises ConfigError and DataError."""
    folder = folder.absolute()
    ranks = num_ranks(*read_step(folder, shards, permission))
    return _rank(folder, shards, permission) if ranks == 1 else spawn(ranks, _rank, folder, shards, permission)


def _rank(folder: Path, shards: str, permission: Permission) -> Ending:
    try:
        with connect() as world:
            torch.set_num_threads(threads_per_rank(world.local_size))
            found = replay(*read_step(folder, shards, permission), folder, world)
    except ClaeError as error:
        return Ending(error.exit_code, shown(f"clae: {error}"))
    return Ending(OK if found.reproduced else UNEXPECTED, found.text)
