"""Locks that a killed compile of a DeepSpeed extension left behind.

torch compiles an extension under a lock file, which the compiling process keeps open until it is done and then removes. A
process killed in between leaves the file, and every process that loads the extension later waits for it forever, silently.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

_NAME = "deepspeed_*"  # what DeepSpeed would compile for training on a CPU is deepspeed_shm_comm


def extension_folders() -> list[Path]:
    """Where torch puts compiled extensions: TORCH_EXTENSIONS_DIR, else one folder a Python and accelerator version."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return [Path(chosen)]
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it tells every CPU that it has no GPU
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(get_default_build_root())
    return sorted(folder for folder in root.iterdir() if folder.is_dir()) if root.is_dir() else []


def stale_locks() -> list[Path]:
    """Lock files of DeepSpeed's extensions that no process on this machine holds open."""
    locks = [lock for folder in extension_folders() for lock in sorted(folder.glob(f"{_NAME}/lock"))]
    return [lock for lock in locks if not _is_held(lock)] if locks else []


def explain(lock: Path) -> str:
    """Message about a stale lock: its age and the way out."""
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(lock.stat().st_mtime))
    return (
        f"DeepSpeed: {lock} is the lock of a compile that was killed (made {since}, and no process on this machine holds it). "
        "This run compiles nothing and continues; a program that loads this extension would wait forever: remove the file."
    )


def _is_held(lock: Path) -> bool:
    """True if a process on this machine has the file open, as far as this user can see."""
    if not os.path.isdir("/proc/self/fd"):
        return time.time() - lock.stat().st_mtime < 3600  # without /proc: no compile takes an hour
    wanted = lock.stat()
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            names = list(descriptors.iterdir())
        except OSError:  # another user's, or gone
            continue
        for name in names:
            try:
                found = name.stat()
            except OSError:
                continue
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False
