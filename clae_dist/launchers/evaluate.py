"""`clae evaluate` on ranks of this machine, in this process, or as a rank that torchrun started."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from clae_dist.cores import threads_per_rank
from clae_dist.errors import OK, ClaeError, ConfigError
from clae_dist.escape import say, shown
from clae_dist.launchers.local import default_workers, spawn
from clae_dist.launchers.rank import Ending
from clae_dist.launchers.torchrun import num_ranks, say_once
from clae_dist.runs.folder import RunFolder
from clae_dist.staging import url_of
from clae_dist.training.finish import Request, evaluate
from clae_dist.world import connect

_TIMEOUT_S = 7 * 86_400.0  # other ranks wait as long as rank 0 fits a classifier; a lost rank ends them through the launcher
_ADVICE = "The same command continues from the finished work."


def evaluate_on(request: Request, launcher: str, workers: int = 0) -> Ending:
    """Evaluate on `workers` ranks (0: one a GPU). Raises ConfigError for a launcher that is not there.

    Args:
        launcher: "local", "torchrun" for a process that torchrun started, or "ray".
    """
    if launcher == "torchrun":
        if not num_ranks():
            raise ConfigError(
                "--launcher is torchrun, but RANK and WORLD_SIZE are not set; start with `torchrun --nproc-per-node=2 -m "
                "clae_dist evaluate RUN --launcher torchrun`, or use --launcher local."
            )
        return say_once(rank(request))
    workers = workers or default_workers(request.device)
    if launcher == "ray":
        from clae_dist.launchers.ray_work import run_on_ray

        if os.environ.get("RAY_ADDRESS"):
            _refuse_bucket(request)
        folder = RunFolder(Path(request.to or request.subject).expanduser()).ray
        return run_on_ray(rank, (request,), workers, request.device, folder)
    return rank(request) if workers == 1 else spawn(workers, rank, request, advice=_ADVICE)


def rank(request: Request) -> Ending:
    """The work of one rank."""
    try:
        with connect(_TIMEOUT_S, request.device) as world:
            if world.local_size < world.size:
                _refuse_bucket(request)
            torch.set_num_threads(request.threads or threads_per_rank(world.local_size))
            evaluate(request, world, say if world.is_main else _silent)
    except ClaeError as error:
        if not error.on_all_ranks and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise
        return Ending(error.exit_code, shown(f"clae: {error}"))
    return Ending(OK, "")


def _refuse_bucket(request: Request) -> None:
    """Ranks on several hosts write to files that all of them map. Raises ConfigError for a run that each host would copy."""
    if Path(request.subject).is_absolute() and (url := url_of(Path(request.subject))):
        raise ConfigError(
            f"SUBJECT is {url!r}, whose copies several hosts do not share, as ranks of an evaluation must; use one host "
            "(--launcher local), or copy the run to a folder that all hosts see."
        )


def _silent(_: str) -> None: ...
