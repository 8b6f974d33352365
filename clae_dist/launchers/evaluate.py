"""`clae evaluate` on ranks of this machine, in this process, or as a rank that torchrun started."""

from __future__ import annotations

import os
import platform
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from clae_dist.cores import threads_per_rank
from clae_dist.errors import OK, CheckpointError, ClaeError, ConfigError
from clae_dist.escape import say, shown
from clae_dist.launchers.local import default_workers, spawn
from clae_dist.launchers.rank import Ending
from clae_dist.launchers.torchrun import num_ranks, say_once
from clae_dist.runs.copies import copied
from clae_dist.runs.folder import RunFolder
from clae_dist.staging import copy_folder, url_of
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

        folder = RunFolder(Path(request.to or request.subject).expanduser()).ray
        url = url_of(Path(request.subject)) if os.environ.get("RAY_ADDRESS") and Path(request.subject).is_absolute() else ""
        return run_on_ray(rank, (request, url), workers, request.device, folder)
    return rank(request) if workers == 1 else spawn(workers, rank, request, advice=_ADVICE)


def rank(request: Request, url: str = "") -> Ending:
    """The work of one rank; `url` is that of a subject in a bucket, of which this node may have no copy."""
    try:
        with connect(_TIMEOUT_S, request.device) as world, ExitStack() as stack:
            if url:
                request = replace(request, subject=str(copy_folder(url)))
                world.raise_together(CheckpointError, _copy(Path(request.subject), stack) if world.local_rank == 0 else "")
            torch.set_num_threads(request.threads or threads_per_rank(world.local_size))
            evaluate(request, world, say if world.is_main else _silent)
    except ClaeError as error:
        if not error.on_all_ranks and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise
        return Ending(error.exit_code, shown(f"clae: {error}"))
    return Ending(OK, "")


def _copy(folder: Path, stack: ExitStack) -> str:
    """Fetch what a folder stages, and send back what is written there when the stack ends; a problem in words, or ""."""
    try:
        stack.enter_context(copied([folder], _silent))
    except ClaeError as error:
        return f"on {platform.node()}: {error}"
    return ""


def _silent(_: str) -> None: ...
