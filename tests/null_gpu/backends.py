"""`python -m tests.null_gpu.backends SHARDS FOLDER GPUS`: every backend trains and resumes, in one process a rank.

Rank R leaves FOLDER/rank-R.json: for each backend how both runs ended, and what each of their steps counted. With one GPU the
first run is then evaluated, reported and exported.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from clae_dist.cli import main as clae
from clae_dist.config import Checkpointing, Config, Evaluation, Launch, Parallel, Train
from clae_dist.errors import OK
from clae_dist.launchers.local import spawn
from clae_dist.launchers.rank import Ending, RankBroke, run_rank
from clae_dist.recipe import Recipe
from clae_dist.runs.checkpoint.write import delete_folder
from clae_dist.runs.folder import RunFolder
from tests.null_gpu import program
from tests.small_run import small_run

BACKENDS: dict[str, Parallel] = {
    "ddp": Parallel(),
    "fsdp2": Parallel(backend="fsdp2"),
    "zero-0": Parallel(backend="deepspeed", zero_stage=0),
    "zero-1": Parallel(backend="deepspeed", zero_stage=1),
    "zero-2": Parallel(backend="deepspeed", zero_stage=2),
}


def configs(shards: str, folder: Path, gpus: int) -> list[Config]:
    """A run of 4 steps for each backend, saved after 2 and 4."""
    first = small_run(
        shards,
        folder,
        train=Train(epochs=1, log_every=1, diagnose_every=100, knn_every=0),
        checkpoint=Checkpointing(every_steps=2),
        evaluation=Evaluation(linear_iterations=2, linear_penalty=0.1),
        launch=Launch(workers=gpus, device="cuda"),
    )
    return [replace(first, run_dir=str(folder / name), parallel=parallel) for name, parallel in BACKENDS.items()]


def train_and_resume(runs: list[Config], ports: list[int], folder: Path) -> Ending:
    """Each of `runs` to its end, and again from the checkpoint before the last; each start has a store at a port of its own."""
    rank = int(os.environ.get("RANK", "0"))
    report: dict[str, Any] = {"devices": [], "runs": {}}
    starts = iter(ports)
    for config in runs:
        endings: list[str] = []
        report["runs"][config.folder.name] = found = {"endings": endings, "steps": []}
        for again in (False, True):
            if ports:
                os.environ["MASTER_PORT"] = str(next(starts))
            if again and rank == 0:
                delete_folder(RunFolder(config.folder).find_checkpoints()[0])
            _forget_groups()
            before = len(program.STEPS)
            try:
                ending = run_rank(Recipe(config), None)
                endings.append(ending.message)
            except RankBroke as error:
                endings.append(str(error))
            found["steps"].append(program.STEPS[before:])
            report["devices"] = program.devices()
            (folder / f"rank-{rank}.json").write_text(json.dumps(report))
            if endings[-1]:
                break
        if endings[-1] and ports:  # a group that broke is of no more use
            break
    return Ending(OK, "")


def _forget_groups() -> None:
    """DeepSpeed keeps the process group of the run before, which has ended; elsewhere a process has one run."""
    kept = {"deepspeed.comm.comm": ("cdb",), "deepspeed.utils.groups": ("_WORLD_GROUP", "mesh_device")}
    for module, names in kept.items():
        for name in names if module in sys.modules else ():
            setattr(sys.modules[module], name, None)


def main(shards: str, folder: Path, gpus: int) -> int:
    """Returns an exit code."""
    runs = configs(shards, folder, gpus)
    if gpus > 1:
        stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(2 * len(runs))]
        return spawn(gpus, train_and_resume, runs, [store.port for store in stores], folder).code
    train_and_resume(runs, [], folder)
    return max(clae([command, str(runs[0].folder)]) for command in ("evaluate", "report", "export"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
