"""Where a run's checkpoints lie: RUN/checkpoints/step-00000123/."""

from __future__ import annotations

import re
from pathlib import Path

INDEX = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; older ones are untouched."""


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step-"))


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first, damaged ones among them."""
    folder = checkpoints_folder(run_dir)
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)
