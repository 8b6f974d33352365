"""Flight recorders of NCCL and gloo: the collectives of each rank, written down before ranks leave after a hang or an error.

torch keeps them in a ring buffer of each process. `python -m torch.distributed.flight_recorder.fr_trace RUN/hang -p
nccl-trace-rank-` compares those of all ranks.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from clae_dist.runs.folder import RunFolder
from clae_dist.world import World

_EVENTS = "2000"  # collectives that are remembered
_DUMP_S = 5.0  # a recorder may wait for the thread that hangs


def switch_on(run_dir: Path) -> None:
    """Set the environment for a process group that is started later; what the user has set stays."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _EVENTS)
    # NCCL's own watchdog may end the process before anybody else sees the error.
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", os.fspath(RunFolder(run_dir).hang / "nccl-trace-rank-"))


def make_room(folder: RunFolder, world: World) -> None:
    """Create the folder that NCCL itself would write to."""
    if world.is_main and world.collectives == "nccl":
        folder.hang.mkdir(exist_ok=True)


def recorders() -> dict[str, Callable[[], bytes]]:
    """The functions of this torch that return a recorder's content, by the name of its library."""
    if not torch.distributed.is_available():
        return {}
    module = torch._C._distributed_c10d
    names = {"gloo": "_dump_fr_trace", **({"nccl": "_dump_nccl_trace"} if torch.cuda.is_initialized() else {})}
    return {library: getattr(module, name) for library, name in names.items() if hasattr(module, name)}


def dump(run_dir: Path, rank: int) -> None:
    """Write the recorders' content to RUN/hang, within a few seconds or not at all."""
    thread = threading.Thread(target=_dump, args=(RunFolder(run_dir).hang, rank), name="flight recorder", daemon=True)
    thread.start()
    thread.join(_DUMP_S)


def _dump(folder: Path, rank: int) -> None:
    for library, recorded in recorders().items():
        try:
            content = recorded()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{library}-trace-rank-{rank}").write_bytes(content)
        except (OSError, RuntimeError) as error:  # the process ends because of another error
            with suppress(OSError, ValueError):
                print(f"clae: the flight recorder of {library} was not written ({error})", file=sys.stderr)
