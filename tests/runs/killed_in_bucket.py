"""Saves a checkpoint to a bucket in processes that another one kills (run by test_object_kills.py).

For each line of stdin, a process is forked that saves step 2 and says "committed" when the save is over; then its end is said.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from tests.checkpoints import write_checkpoint

OLD = {"model/weight": torch.arange(3.0), "model/other": torch.ones(2, 2)}
NEW = {"model/weight": torch.arange(500_000).float(), "model/other": torch.zeros(2, 2)}


def main(run_dir: Path) -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(f"pid {os.getpid()}", flush=True)
            assert sys.stdin.readline() == "begin\n"
            write_checkpoint(run_dir, 2, NEW, size=2, sharded=True, keep=1, attempt=f"attempt{line.strip()}")
            print("committed", flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
