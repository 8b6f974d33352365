"""Kills a process at every point of a checkpoint's write and commit, and looks at what it leaves (run by test_checkpoint.py).

Points are what the interpreter's audit hook sees of the run folder (files opened, renamed, removed, folders made and removed)
and every chunk of data that is written. Prints {"points": n, "steps": which checkpoint was found after each kill}.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from clae_dist.runs.checkpoint import Writer, load_checkpoint, remove_leftovers, safetensors_file
from tests.checkpoints import write_checkpoint

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
OLD = {"model/weight": torch.arange(3.0), "model/other": torch.ones(2, 2)}
NEW = {"model/weight": torch.arange(5_000.0), "model/other": torch.zeros(2, 2)}  # three chunks


def die_at(point: int, run_dir: Path) -> None:
    """From now on, this process kills itself at the point of that number."""
    count = 0

    def passed(of_ours: bool = True) -> None:
        nonlocal count
        count += of_ours
        if of_ours and count > point:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:  # rmtree names what it removes relative to a folder's descriptor
            passed(str(run_dir) in str(arguments[0]) or (event != "open" and arguments[-1] not in (-1, None)))

    Writer._check = lambda self: passed()  # type: ignore[method-assign]
    sys.addaudithook(hook)


def found_after(run_dir: Path) -> int:
    """The step that a next start goes on from, its tensors as they were written, nothing left behind."""
    remove_leftovers(run_dir)
    said: list[str] = []
    checkpoint = load_checkpoint(run_dir, said.append)
    assert checkpoint is not None
    assert not said, said  # not even a damaged one: it has its name or it has not
    for name, value in (OLD if checkpoint.step == 1 else NEW).items():
        assert torch.equal(checkpoint[name], value)
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert left <= {"step-00000001", "step-00000002"}, left
    return checkpoint.step


def main(run_dir: Path) -> None:
    torch.set_num_threads(1)
    safetensors_file._CHUNK = 8 << 10
    steps: list[int] = []
    while True:
        shutil.rmtree(run_dir, ignore_errors=True)
        write_checkpoint(run_dir, 1, OLD)
        child = os.fork()
        if child == 0:
            die_at(len(steps), run_dir)
            write_checkpoint(run_dir, 2, NEW, size=2, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        steps.append(found_after(run_dir))
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    print(json.dumps({"points": len(steps) - 1, "steps": steps}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
